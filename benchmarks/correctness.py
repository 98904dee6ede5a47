"""What torch's own gradient clipping answers today, what is right, and what distclip answers.

    python -m benchmarks.correctness [--only torch] [--json FILE] [--save]

Exits with 1 where an answer of distclip is wrong or missing. The cases are those of
`tests/benchmarks/test_correctness.py`, on the same ranks (gloo, on the CPU).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from tests.benchmarks.answers import LIBRARIES, Measured, measure
from tests.benchmarks.torch_defects import CASES, NUM_RANKS
from tests.support.ranks import Ranks

TITLE = "Gradient clipping: the right answer, torch's and distclip's"
LEGEND = "g: the gradient element furthest from zero, after clipping."


def table(rows: Sequence[dict[str, Measured]]) -> tables.Lines:
    """One line for each case, one column for each library."""
    first = [next(iter(row.values())) for row in rows]
    cells = [[m.text for m in row.values()] for row in rows]
    titles = [[m.case.title, m.right_text, *line] for m, line in zip(first, cells, strict=True)]
    return [["case", "right answer", *rows[0]], *titles]


def main(argv: Sequence[str] | None = None) -> int:
    parser, began = tables.parser("correctness", __doc__), time.perf_counter()
    parser.add_argument("--only", choices=LIBRARIES, help="ask only one library")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers of every rank")
    parser.add_argument("--save", action="store_true", help="write results/correctness-DATE.md")
    options, ranks = parser.parse_args(argv), Ranks(NUM_RANKS)
    libraries = (options.only,) if options.only else tuple(LIBRARIES)
    rows = [measure(key, ranks, libraries) for key in CASES]
    lines, about = table(rows), tables.run_facts(began)
    print(tables.plain(lines), LEGEND, tables.listed(about), sep="\n\n")
    if options.json:
        write_json(options.json, {**about, "rows": [as_json(row) for row in rows]})
    if options.save:
        tables.save("correctness", TITLE, about, tables.markdown(lines), LEGEND)
    wrong = [row["distclip"] for row in rows if "distclip" in row and not row["distclip"].is_right]
    for each in wrong:
        messages = [answer.message for answer in each.answered if answer.message]
        answer = f"{each.case.title}: {each.text}. {''.join(messages[:1])}"
        print(f"distclip is wrong: {answer}", file=sys.stderr)
    return 1 if wrong else 0


def as_json(row: dict[str, Measured]) -> dict[str, Any]:
    first = next(iter(row.values()))
    right = first.right and vars(first.right)
    cells = {library: measured.as_json() for library, measured in row.items()}
    return {"key": first.case.key, "title": first.case.title, "right": right, **cells}


def write_json(path: Path, report: dict[str, Any]) -> None:
    """JSON has no NaN and no infinity: they become strings that `float` reads."""
    finite = json.loads(json.dumps(report), parse_constant=str)
    path.write_text(json.dumps(finite, indent=1, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
