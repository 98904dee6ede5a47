"""The table: one row for each step of each layout, clipped in each way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distclip.parity.comparison import COLUMNS, Outcome


@dataclass(frozen=True, repr=False)
class ParityReport:
    """What `parity` found. `print(report)` is a table, and below it what differs.

    Attributes:
        outcomes: one for each layout, clip and step, in the order in which they ran.
        world_size: how many ranks ran.
        versions: of what ran, for the reader of the table.
    """

    outcomes: tuple[Outcome, ...]
    world_size: int
    versions: str = ""

    @property
    def agrees(self) -> bool:
        """Whether everything is as it is in one process, for every clip."""
        return all(outcome.agrees for outcome in self.outcomes)

    def of(self, clip: str | None = None, layout: str | None = None) -> ParityReport:
        """The rows of one clip, or of one layout.

        Raises:
            KeyError: there are none.
        """
        chosen = tuple(
            outcome
            for outcome in self.outcomes
            if clip in (None, outcome.clip) and layout in (None, outcome.layout)
        )
        if not chosen:
            known = sorted({(each.layout, each.clip) for each in self.outcomes})
            raise KeyError(f"no row has clip={clip!r} and layout={layout!r}; there are {known}")
        return ParityReport(chosen, self.world_size, self.versions)

    def raise_if_different(self, clip: str | None = None) -> None:
        """Raises AssertionError, with the table, unless everything agrees; or that of one clip."""
        report = self if clip is None else self.of(clip)
        if not report.agrees:
            raise AssertionError(f"clipping differs between ranks and one process\n{report}")

    def __repr__(self) -> str:
        head = f"{self.world_size} ranks against one process in float64{self.versions}"
        rows = [("layout", "clip", "step", *COLUMNS, ""), *map(_row, self.outcomes)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([head, *lines, *_details(self.outcomes)])


def _row(outcome: Outcome) -> tuple[str, ...]:
    cells = [outcome.cells[column].text if column in outcome.cells else "-" for column in COLUMNS]
    verdict = "agrees" if outcome.agrees else "DIFFERS"
    return (outcome.layout, outcome.clip, outcome.step, *cells, verdict)


def _details(outcomes: Sequence[Outcome]) -> list[str]:
    lines: list[str] = []
    first: dict[tuple[str, ...], str] = {}  # the same gradients are the same for every clip
    for outcome in outcomes:
        for column, cell in outcome.cells.items():
            if cell.agrees:
                continue
            title = f"{outcome.title}: {column}"
            known = first.setdefault(cell.details, title)
            lines.append(title if known is title else f"{title}: as above, {known}")
            if known is title:
                lines += [f"    {detail}" for detail in cell.details or (cell.text,)]
    return ["", *lines] if lines else []
