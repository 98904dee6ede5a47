"""`distclip report`: runs as a picture, a page and a summary in words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distclip.cli.console import UserError, printable, progress
from distclip.monitoring.lines import FILE_NAME

if TYPE_CHECKING:
    from distclip.monitoring.records import Run
    from distclip.monitoring.summary import Summary

_PICTURE, _PAGE = "report.png", "report.html"
_KEY_FIGURES = {
    "steps": "steps",
    "clipped_share": "clipped",
    "median_norm": "median norm",
    "largest_norm": "largest norm",
    "nonfinite_steps": "not finite",
    "last_loss": "last loss",
}


@dataclass(frozen=True)
class Report:
    """Draws runs as a picture and as a page for a browser, and says in words what happened.

    Writes report.png and report.html, into the folder of the run where it is one, else into the
    current folder. Several runs stand side by side. The words: how often and how strongly it
    clipped, spikes and which layers led them, layers whose gradient vanishes or explodes, steps
    that were not finite and who caused them, the loss, and what the file lacks.
    """

    runs: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders with a history.jsonl, which distclip.History writes, or such files."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The folder for the two files. It is made where it does not exist."""

    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> Result:
        """Reads, draws and writes.

        Raises:
            UserError: there is no run, or one that cannot be read; or the folder cannot be written.
        """
        files = _files(self.runs)
        with progress("report", len(files) + 3) as advance:
            runs: list[Run] = []
            for file in files:
                runs.append(_read(file))
                advance(f"read {file}")
            runs = _told_apart(runs)
            folder = _folder(self.out, runs)
            from distclip.monitoring.summary import summarize

            summaries = [summarize(run) for run in runs]
            advance("summarized")
            picture, page = folder / _PICTURE, folder / _PAGE
            try:
                _draw(runs, picture)
                advance(f"drew {picture}")
                _write_page(runs, summaries, page)
                advance(f"wrote {page}")
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {_why(error)}") from None
        return Result(summaries, [str(run.path) for run in runs], str(picture), str(page))


@dataclass(frozen=True)
class Result:
    """What happened in each run, and the files that show it."""

    summaries: Sequence[Summary]
    files: Sequence[str]
    picture: str
    page: str

    def to_dict(self) -> dict[str, Any]:
        runs = [
            {**summary.to_dict(), "file": file}
            for summary, file in zip(self.summaries, self.files, strict=True)
        ]
        return {"runs": runs, "picture": self.picture, "page": self.page}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts = [part for summary in self.summaries for part in _shown(summary)]
        table = [_table(self.summaries)] if len(self.summaries) > 1 else []
        paths = Text("\n".join(map(printable, (self.picture, self.page))), overflow="fold")
        return Group(*parts, *table, paths)


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files of the runs; each once."""
    from distclip.monitoring.records import HistoryError, find

    if not paths:
        raise UserError("name at least one RUN: a folder with a history.jsonl, or such a file")
    seen: dict[Path, Path] = {}
    files: list[Path] = []
    for path in paths:
        try:
            file = find(path)
        except HistoryError as error:
            raise UserError(str(error)) from None
        if (first := seen.setdefault(file.resolve(), path)) is not path:
            how = "" if str(first) == str(path) else f", as {first} and as {path}"
            raise UserError(f"{file} is given twice{how}: name each run once")
        files.append(file)
    return files


def _read(file: Path) -> Run:
    from distclip.monitoring.records import HistoryError, read_run

    try:
        return read_run(file)
    except HistoryError as error:
        raise UserError(str(error)) from None


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same name get as much of their paths as tells them apart."""
    num_same = Counter(run.name for run in runs)
    alike = {i: _whole(run) for i, run in enumerate(runs) if num_same[run.name] > 1}
    if not alike:
        return [*runs]
    common = Path(os.path.commonpath([path.parent for path in alike.values()]))
    names = {i: str(path.relative_to(common)) for i, path in alike.items()}
    return [replace(run, name=names.get(i, run.name)) for i, run in enumerate(runs)]


def _whole(run: Run) -> Path:
    """The path that the name of the run is the end of."""
    path = run.path.resolve()
    return path.parent if path.name == FILE_NAME else path.with_suffix("")


def _folder(out: Path | None, runs: Sequence[Run]) -> Path:
    folder = out or (runs[0].path.parent if len(runs) == 1 else Path.cwd())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {_why(error)}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written: name another folder with --out")
    return folder


def _draw(runs: Sequence[Run], path: Path) -> None:
    from distclip.monitoring.picture import draw

    draw(runs, path)


def _write_page(runs: Sequence[Run], summaries: Sequence[Summary], path: Path) -> None:
    from distclip.monitoring.page import write_page

    write_page(runs, summaries, path)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _shown(summary: Summary) -> list[Any]:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 1))
    for finding in summary.findings:
        sign = Text("!", "bold red") if finding.is_warning else Text("-", "dim")
        lines.add_row(sign, Text(printable(finding.text)))
    return [Text(printable(summary.run), "bold"), Padding(lines, (0, 0, 1, 1))]


def _table(summaries: Sequence[Summary]) -> Any:
    """The runs side by side."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("run", overflow="fold")
    for name in _KEY_FIGURES.values():
        table.add_column(name, justify="right")
    for summary in summaries:
        cells = (_cell(name, summary.figures.get(name)) for name in _KEY_FIGURES)
        table.add_row(Text(printable(summary.run)), *map(Text, cells))
    return table


def _cell(name: str, value: float | int | str | None) -> str:
    from distclip.monitoring.findings import number, percent

    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return percent(value) if name.endswith("share") else number(value)
