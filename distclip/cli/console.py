"""How commands show results, errors and progress. Only results go to stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Generator, Sequence
from typing import Any, Protocol, cast

_NUM_LINES = 10  # of progress in a log: nobody reads more


class UserError(Exception):
    """Something that the user can put right: one line on stderr, and exit code 2."""


class Result(Protocol):
    """What a command has found. An attribute `exit_code`, 0 without it, ends the process."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts. JSON has no NaN and no infinity."""
        ...

    def __rich__(self) -> Any:
        """What rich shows."""
        ...


class Advance(Protocol):
    def __call__(self, note: str = "") -> None:
        """One more is done; `note` says which."""
        ...


def show(result: Result, as_json: bool) -> None:
    """Prints a result: one JSON object, or what rich makes of it."""
    print((_json(result) if as_json else _drawn(result)).rstrip("\n"))


def _json(result: Result) -> str:
    return json.dumps(_without_nan(result.to_dict()), indent=2, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """Norms near the largest float have infinite sums; such a figure is a string in JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in cast("Sequence[Any]", value)]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drawn(result: Result) -> str:
    """rich would end the process by itself where it cannot print; captured, it does not print."""
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(result, crop=False)
    return captured.get()


def fail(command: str, message: str) -> int:
    """Prints one line on stderr; returns the exit code."""
    print(f"{command}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """Names come from files, and may hold what a terminal obeys; such characters are escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


@contextlib.contextmanager
def progress(what: str, total: int) -> Generator[Advance, None, None]:
    """Shows on stderr how many of `total` are done: a bar on a terminal, about ten lines in a log.

    Example:
        >>> with progress("reading runs", 2) as advance:
        ...     for name in ("a", "b"):
        ...         advance(name)
    """
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        yield _lines(what, total)


def _lines(what: str, total: int) -> Advance:
    done = 0

    def advance(note: str = "") -> None:
        nonlocal done
        done += 1
        if done * _NUM_LINES // total > (done - 1) * _NUM_LINES // total:
            print(
                f"{what}: {done} of {total}  {printable(note)}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    return advance


@contextlib.contextmanager
def _bar(what: str, total: int) -> Generator[Advance, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    note = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, note, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=printable(note))

        yield advance
