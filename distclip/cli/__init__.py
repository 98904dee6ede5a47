"""Shows what clipping does in a training run, and whether it works here.

`distclip COMMAND --help` explains a command. Each prints one JSON object with
--json. The exit code is 2 where the input is wrong, with one line on stderr.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import getdoc
from itertools import groupby
from textwrap import fill
from typing import Any

from distclip.cli.console import UserError, fail, show

COMMANDS = (
    "report",
    "suggest",
    "plan",
    "doctor",
)  # "doctor" is the class `Doctor` of doctor.py, and so on
_NEEDS = ("tyro", "rich", "numpy", "matplotlib", "bokeh")  # what the extra `cli` installs
_CLOSED_PIPE, _INTERRUPTED = 141, 130  # what a shell reports for SIGPIPE and SIGINT


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; 2 after an error that the user can put right.

    Args:
        args: the words after `distclip`; those of this process by default.

    Raises:
        SystemExit: `--help` was printed.
    """
    words = sys.argv[1:] if args is None else list(args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding may lack characters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    command = " ".join(["distclip", *(word for word in words[:1] if word in COMMANDS)])
    try:
        try:
            return _run(words)
        finally:
            print(end="", flush=True)  # a pipe that is closed, or a full disk, shows here
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return _CLOSED_PIPE
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in _NEEDS:
            raise
        install = "pip install '.[cli]' in a clone of distclip, or pip install " + " ".join(_NEEDS)
        return fail(command, f"it needs {missing}, which is not installed: {install}")
    except OSError as error:
        _forget_stdout()
        return fail(command, str(error))
    except UserError as error:
        return fail(command, str(error))


def _run(words: list[str]) -> int:
    command = _parse(words)
    result = command.run()
    show(result, command.json)
    return getattr(result, "exit_code", 0)


def _parse(words: list[str]) -> Any:
    """The command that `words` name. tyro prints errors as a box, which becomes one line."""
    if not words or not (words[0] in COMMANDS or words[0].startswith("-")):
        what = f"there is no command {words[0]!r}" if words else "a command is missing"
        raise UserError(f"{what}: name one of {', '.join(COMMANDS)} (distclip --help explains)")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return _read(words)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(printed.getvalue())) from None


def _read(words: list[str]) -> Any:
    """Imports the module of one command only: the others may lack what they need."""
    from tyro import cli
    from tyro.conf import FlagCreatePairsOff
    from tyro.extras import subcommand_cli_from_dict

    no_pairs = [FlagCreatePairsOff]  # no --no-json
    if words[0] not in COMMANDS:
        commands = {name: _class(name) for name in COMMANDS}
        return subcommand_cli_from_dict(
            commands, prog="distclip", description=_wrapped(__doc__), args=words, config=no_pairs
        )
    command, name = _class(words[0]), f"distclip {words[0]}"
    return cli(
        command, prog=name, description=_wrapped(getdoc(command)), args=words[1:], config=no_pairs
    )


def _class(name: str) -> Any:
    """The modules of commands import what takes long when they run."""
    return getattr(import_module(f"distclip.cli.{name}"), name.capitalize())


def _wrapped(text: str | None) -> str:
    """Lines that fit a terminal. tyro wraps all texts but this one, and joins lines of letters."""
    paragraphs = (text or "").split("\n\n")
    return "\n".join(
        fill(part, 79, initial_indent=" ", subsequent_indent=" ") for part in paragraphs
    )


def _one_line(box: str) -> str:
    """The first paragraph inside a box of tyro, which is drawn with ASCII in some locales."""
    inside = [line.strip("│ ") for line in box.splitlines()[1:]]
    paragraphs = groupby(inside, lambda line: bool(line.strip("─╰╯-")))
    texts = (" ".join(lines) for is_text, lines in paragraphs if is_text)
    return next(texts, "cannot read the options; --help lists them")


def _forget_stdout() -> None:
    """Lets Python end without one more attempt to write what could not be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's stdout has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
