"""What torch's own gradient clipping answers today, what is right, and what distclip answers.

    python -m benchmarks.correctness [--only torch] [--json FILE] [--save]

Exits with 1 where an answer of distclip is wrong or missing. Process groups (gloo, on the CPU),
`fully_shard` and FSDP1 are the real ones. The cases are in `correctness_cases.py`.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from benchmarks.correctness_cases import LIBRARIES, Answer, Case
from benchmarks.correctness_ranks import Job, ask_all

NORM_TOLERANCE = 1.2e-7  # one float32 ulp
LEGEND = "g: the gradient element furthest from zero, after clipping"
RESULTS = Path(__file__).parent / "results"


# Judging ------------------------------------------------------------------------------------------


def close(value: float | None, right: float | None, tolerance: float) -> bool:
    if value is None or right is None or not math.isfinite(right):
        return repr(value) == repr(right)
    return math.isclose(value, right, rel_tol=tolerance)


def refuses_well(case: Case, answer: Answer) -> bool:
    """The expected error, which says what it is about, and no gradient has changed."""
    name, word = case.refusal or ("", "")
    return answer.error == name and word in answer.message and answer.largest == answer.before


def is_right(job: Job) -> bool:
    """Every rank was told the same bits, they are the right norm, and the right gradients are left."""
    answers = list(job.answers.values())
    if job.right is None or not job.complete:
        return False
    if job.case.must_refuse or any(answer.error for answer in answers):
        return all(refuses_well(job.case, answer) for answer in answers)
    largest = max((a.largest for a in answers), key=lambda g: (math.isnan(g), abs(g)))
    one_norm = len({repr(answer.norm) for answer in answers}) == 1
    right_norm = close(answers[0].norm, job.right.norm, NORM_TOLERANCE)
    return one_norm and right_norm and close(largest, job.right.largest, job.case.grad_tolerance)


# Showing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: a case and, by library, the job that answered it."""

    case: Case
    jobs: dict[str, Job]

    @property
    def right(self) -> Answer | None:
        return next((job.right for job in self.jobs.values() if job.begun), None)

    def cells(self) -> list[str]:
        right = "-" if self.right is None else self.right.error or self.case.show(self.right)
        return [self.case.title, right, *map(answer_text, self.jobs.values())]

    def as_json(self) -> dict:
        row = {"key": self.case.key, "title": self.case.title, "right": self.right and asdict(self.right)}
        return row | {name: job_json(job) for name, job in self.jobs.items()}


def job_json(job: Job) -> dict:
    answers = [asdict(job.answers[rank]) | {"rank": rank} for rank in sorted(job.answers)]
    return {"text": answer_text(job), "right": is_right(job), "hangs": job.hangs, "answers": answers}


def answer_text(job: Job) -> str:
    answers = list(job.answers.values())
    errors = [answer.error for answer in answers if answer.error]
    if not job.complete:
        return missing_text(job, len(errors))
    if errors:
        return errors[0] if len(errors) == len(answers) else f"{errors[0]} on {len(errors)} ranks"
    # Compared as they are shown: NaN is not equal to itself.
    shown = sorted({job.case.show(answer) for answer in answers})
    return shown[0] + deviation(answers[0].norm, job.right.norm) if len(shown) == 1 else spread(answers)


def missing_text(job: Job, num_errors: int) -> str:
    if not job.begun:
        return "not reached"
    return f"hangs ({num_errors} of {job.case.ranks} ranks raise)" if job.hangs else "a rank died"


def spread(answers: list[Answer]) -> str:
    norms = sorted(answer.norm for answer in answers)
    return f"{norms[0]:.5g} to {norms[-1]:.5g} by rank"


def deviation(norm: float, right: float | None) -> str:
    """How far off a norm is that looks plausible, in percent."""
    plausible = right is not None and math.isfinite(right) and math.isfinite(norm) and norm != 0
    if not plausible or close(norm, right, NORM_TOLERANCE):
        return ""
    return f" ({100 * (norm / right - 1):+.2g} %)"


def plain_text(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(lines: list[list[str]], about: dict) -> str:
    table = [f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])]
    facts = [f"- {name}: {value}" for name, value in about.items()]
    title = "# Gradient clipping: the right answer, torch's and distclip's"
    how = "Made by `python -m benchmarks.correctness --save`."
    return "\n".join([title, "", *facts, "", *table, "", f"{LEGEND}.", how, ""])


# Where it was measured ----------------------------------------------------------------------------


def cpu_name() -> str:
    """Linux alone writes the name where every user can read it; elsewhere the architecture must do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    """The version that was asked, which need not be the one that is installed."""
    return getattr(sys.modules.get(package), "__version__", "not asked")


def about_this_run(seconds: float) -> dict:
    python, distclip = platform.python_version(), version("distclip")
    return {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": f"Python {python}, torch {torch.__version__}, distclip {distclip}",
        "seconds": round(seconds, 1),
    }


# The command --------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    summary = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correctness", description=summary)
    parser.add_argument("--only", choices=LIBRARIES, help="ask one library alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every rank's answer")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/correctness-DATE.md")
    return parser.parse_args(argv)


def strict(value: object) -> object:
    """JSON has no NaN and no infinity: they are written as the strings that `float` reads."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [strict(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def rows_of(jobs: Iterable[Job]) -> list[Row]:
    rows: dict[str, Row] = {}
    for job in jobs:
        rows.setdefault(job.case.key, Row(job.case, {})).jobs[job.library] = job
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    libraries = [options.only] if options.only else list(LIBRARIES)
    begin = time.perf_counter()
    jobs = ask_all(libraries)
    rows, about = rows_of(jobs), about_this_run(time.perf_counter() - begin)
    lines = [["case", "right answer", *libraries], *(row.cells() for row in rows)]
    print(plain_text(lines), LEGEND, *(f"{name}: {value}" for name, value in about.items()), sep="\n")
    if options.json:
        report = {**about, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(strict(report), indent=1, allow_nan=False))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"correctness-{about['date']}.md").write_text(markdown(lines, about))
    return report_wrong([job for job in jobs if job.library == "distclip" and not is_right(job)])


def report_wrong(wrong: list[Job]) -> int:
    for job in wrong:
        message = next((answer.message for answer in job.answers.values() if answer.message), "")
        print(f"distclip is wrong: {job.case.title}: {answer_text(job)}. {message}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
