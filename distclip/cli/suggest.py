"""`distclip suggest`: which limit a run's norms ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distclip.cli.console import UserError, printable, progress

if TYPE_CHECKING:
    from rich.table import Table

    from distclip.monitoring.suggestion import Suggestion
    from distclip.monitoring.suggestion.outcomes import Outcome

_LEAST_WIDTH = 78  # of the table
_MOST_LISTED = 8  # spikes in a line of text; --json has all


@dataclass(frozen=True)
class Suggest:
    """Replays a run's norms through every policy, and recommends one with its reason.

    Thresholds that would have clipped 1, 5 and 10% of the steps, what AutoClip and ZClip would have
    done, and ClipTensorNorm and AdaGC where each step has the norms of all tensors.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A folder with a history.jsonl, which distclip.History writes, or that file."""

    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> Result:
        from distclip.monitoring.records import HistoryError, read_run
        from distclip.monitoring.suggestion import suggest
        from distclip.monitoring.suggestion.outcomes import facts_of, policies_for
        from distclip.monitoring.suggestion.replay import series_of

        try:
            run = read_run(self.path)
            facts = [facts_of(series) for series in series_of(run)]
        except HistoryError as error:
            raise UserError(str(error)) from None
        asked = [(each, policies_for(each)) for each in facts]
        with progress("replaying", sum(len(policies) for _, policies in asked)) as advance:
            found = [suggest(run, each, policies, advance) for each, policies in asked]
        return Result(run.name, str(run.path), found)


@dataclass(frozen=True)
class Result:
    """One suggestion, or one for each parameter group."""

    run: str
    path: str
    suggestions: Sequence[Suggestion]

    def to_dict(self) -> dict[str, Any]:
        suggestions = [each.to_dict() for each in self.suggestions]
        return {"run": self.run, "path": self.path, "suggestions": suggestions}

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*(part for each in self.suggestions for part in _shown(self.run, each)))


def _shown(run: str, suggestion: Suggestion) -> Iterator[Any]:
    from rich.text import Text

    recommended = suggestion.recommendation
    of_group = f", group {suggestion.group}" if suggestion.group else ""
    name = printable(f"{run}{of_group}")
    yield Text(f"{name}: {suggestion.num_steps:,} steps{_spikes(suggestion)}", "bold")
    yield _table(suggestion)
    yield Text(f"{recommended.kind.capitalize()}: {recommended.code or 'no policy'}", "bold")
    yield Text(recommended.reason)
    for note in suggestion.notes:
        yield Text(f"- {note}", "dim")
    yield Text()


def _spikes(suggestion: Suggestion) -> str:
    steps = [*map(str, suggestion.spikes[:_MOST_LISTED])]
    if (more := len(suggestion.spikes) - len(steps)) > 0:
        steps.append(f"and {more:,} more")
    return f"; spikes in {', '.join(steps)}" if steps else "; no spikes"


def _table(suggestion: Suggestion) -> Table:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # On a narrow terminal, which wraps its lines: rich would leave out the figures.
    width = _LEAST_WIDTH if Console().width < _LEAST_WIDTH else None
    table = Table(box=box.SIMPLE, pad_edge=False, width=width)
    table.add_column("policy", no_wrap=True)
    late = f"after {suggestion.num_first}"
    for name in ("clipped", late, "mean coeff.", "least coeff.", "spikes caught"):
        table.add_column(name, justify="right")
    for each in suggestion.outcomes:
        is_it = each.code == suggestion.recommendation.code
        table.add_row(*_row(each, len(suggestion.spikes)), style="bold" if is_it else None)
    return table


def _row(outcome: Outcome, num_spikes: int) -> tuple[str, ...]:
    return (
        outcome.code.removeprefix("distclip."),
        f"{outcome.clipped:.2%}",
        f"{outcome.clipped_later:.2%}",
        f"{outcome.mean_coefficient:.3g}",
        f"{outcome.smallest_coefficient:.3g}",
        f"{len(outcome.caught)}/{num_spikes}",
    )
