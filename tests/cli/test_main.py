"""The command line as a whole: words in, one line or one JSON object out, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distclip import cli
from distclip.cli import console

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "distclip.cli"]


@dataclass
class Found:
    value: object = 1
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def __rich__(self) -> str:
        return f"the [b]value[/b] is {self.value}"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `distclip doctor` do something else: return, or raise."""

    def replace(what: object) -> None:
        @dataclass(frozen=True)
        class Doctor:
            """Some command."""

            json: bool = False
            """One JSON object."""

            def run(self) -> object:
                if isinstance(what, BaseException):
                    raise what
                return what

        monkeypatch.setattr("distclip.cli.doctor.Doctor", Doctor)

    return replace


def test_a_result_is_shown_or_is_one_json_object(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(Found("[b]7"))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "the value is 7\n"
    assert cli.main(["doctor", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"value": "[b]7"}
    assert shown.err == ""


def test_a_result_may_name_its_exit_code(command: Any) -> None:
    command(Found(exit_code=1))
    assert cli.main(["doctor", "--json"]) == 1


def test_json_has_words_for_numbers_that_it_lacks(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(Found(float("nan")))
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"value": "NaN"}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (console.UserError("no\nsuch run"), 2, "distclip doctor: error: no such run\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            2,
            "distclip doctor: error: [Errno 2] No such file or directory: 'x.json'\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_are_one_line(
    command: Any,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    command(error)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("x", name="x")])
def test_a_defect_is_not_hidden(command: Any, error: Exception) -> None:
    command(error)
    with pytest.raises(type(error)):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "distclip: error: a command is missing: name one of "),
        (["docter"], "distclip: error: there is no command 'docter': name one of "),
        (["--jsno"], "distclip: error: Unrecognized options: --jsno"),
        (["doctor", "--jsno"], "distclip doctor: error: Unrecognized options: --jsno"),
        (["doctor", "--json", "3"], "distclip doctor: error: Unrecognized options: 3"),
    ],
)
def test_wrong_words_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert max(map(len, shown.out.splitlines())) <= 80, shown.out
    expected = cli.COMMANDS if words == ["--help"] else ("--json",)
    assert [word for word in expected if word not in shown.out] == []


def test_progress_in_a_log_is_about_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("reading", 1000) as advance:
        for number in range(1000):
            advance(f"run {number}")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 10
    assert (lines[0], lines[-1]) == (
        "reading: 100 of 1000  run 99",
        "reading: 1000 of 1000  run 999",
    )


def test_progress_of_few_things_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("reading", 2) as advance:
        advance()
        advance("b")
    assert capsys.readouterr().err == "reading: 1 of 2\nreading: 2 of 2  b\n"


@pytest.mark.ranks
def test_progress_on_a_terminal_is_a_bar_that_goes_away() -> None:
    pty = pytest.importorskip("pty")
    code = (
        "from distclip.cli.console import progress\n"
        "with progress('reading', 3) as advance:\n"
        "    [advance(f'[run {n}]') for n in range(3)]\n"
        "print('result')"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=120,
        check=False,
        env=env,
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert done.stdout == b"result\n"
    assert "━" in shown
    assert "3/3" in shown
    assert "[run 2]" in shown
    assert shown.endswith("\x1b[2K")  # the line of the bar is erased


# Real processes from here on.


@pytest.mark.ranks
def test_without_the_extra_one_line_says_what_to_install() -> None:
    """A Python that finds neither tyro nor rich."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tyro", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from distclip.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("distclip doctor: error: it needs tyro, which is not installed")
    assert "pip install '.[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.ranks
def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
import distclip
before = {name.partition(".")[0] for name in sys.modules}
from distclip.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*sorted({name.partition(".")[0] for name in sys.modules} - before), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert {"tyro", "rich"} & loaded
    heavy = {"numpy", "matplotlib", "bokeh", "pandas", "transformers", "deepspeed", "numba"}
    assert loaded & heavy == set()


@pytest.mark.ranks
def test_a_closed_pipe_ends_quietly() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} --help | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.ranks
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 2
    assert done.stderr == "distclip: error: [Errno 28] No space left on device\n"
