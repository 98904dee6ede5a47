"""The file of a `History`: taken over by each start, and appended to."""

from __future__ import annotations

import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distclip.monitoring.lines import FORMAT, line_of
from distclip.version import __version__

_STEP = re.compile(rb'\{"step": (\d{1,18}), .*\}\n')
_AFTER = re.compile(rb'\{"history": .*"after": (\d{1,18})\}\n')
_FORMAT = re.compile(rb'\{"history": (\d+)[,}]')


def open_file(path: Path, after: int | None) -> tuple[int, int]:
    """The descriptor of the file, with the header of this start, and the last step before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last_step = _take_over(path, _header(after))
    return os.open(path, os.O_WRONLY | os.O_APPEND), last_step


def write_whole(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]


def _header(after: int | None) -> bytes:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    header: dict[str, Any] = {"history": FORMAT, "distclip": __version__, "started": started}
    return line_of(header if after is None else header | {"after": after})


def _take_over(path: Path, header: bytes) -> int:
    """Puts a copy in the file's place, with the header of this start; the last step in it.

    The copy leaves out a last line that a kill has cut.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
        raise ValueError(f"cannot append to {path}: it is no file. Choose another folder.")
    path.touch()
    temporary, last_step = path.with_suffix(".tmp"), 0
    with path.open("rb") as file:
        _check_own(path, file.readline())
        file.seek(0)
        try:
            with temporary.open("wb") as copy:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    _check_format(path, line)
                    copy.write(line)
                    if found := _STEP.match(line) or _AFTER.match(line):
                        last_step = int(found[1])
                copy.write(header)
                copy.flush()
                os.fsync(copy.fileno())  # after a power cut, else, the file may be empty
        except ValueError:
            temporary.unlink()
            raise
    temporary.replace(path)
    return last_step


def _check_format(path: Path, line: bytes) -> None:
    if (found := _FORMAT.match(line)) and (version := found[1].decode()[:9]) != str(FORMAT):
        raise ValueError(
            f"cannot append to {path}: a part of it was written in format {version}, of which "
            f"distclip {__version__} knows nothing, and no reader could read both. Choose another "
            f"folder, or go on with the version of distclip that wrote it."
        )


def _check_own(path: Path, first_line: bytes) -> None:
    if first_line and not first_line.startswith((b'{"history":', b'{"step":')):
        raise ValueError(
            f"cannot append to {path}: it was not written by distclip.History, and its rows would "
            f"be mixed with others. Choose another folder, or move the file."
        )
