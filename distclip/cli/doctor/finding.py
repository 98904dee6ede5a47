"""What a check has found, and what to do about it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["ok", "warning", "unusable", "absent"]


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        section: what kind of thing was checked.
        name: of the thing.
        status: "ok"; "warning": not tested, slower, or set up half; "unusable": it is there and
            failed; "absent": not installed, or no such device.
        found: a version, a number, or what it raised.
        advice: what to do about it; "" where nothing is to be done.
        needed: distclip does not work here where this is unusable.
    """

    section: str
    name: str
    status: Status
    found: str
    advice: str = ""
    needed: bool = False
