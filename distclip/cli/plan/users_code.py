"""Code of the user: how it is found, and how its errors and what it prints are shown."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeAlias, cast

import torch.distributed as dist

from distclip.arguments import shown
from distclip.cli.console import UserError

Function: TypeAlias = Callable[..., Any]

_WITHOUT_A_GPU = (
    "; it runs without a GPU, on the meta device, where tensors have no values: leave out what "
    "moves the model (`.cuda()`, `to_empty`) or reads values, or do it after this function"
)
_SIGNS_OF_A_DEVICE = ("cuda", "nvidia", "accelerator", "meta tensor", "meta device")


def load_function(target: str) -> Function:
    """The function that `module:function` or `file.py:function` names.

    Raises:
        UserError: there is none, or the import fails.
    """
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise UserError(f"--model {target}: write module:function, or file.py:function")
    with users_code(f"cannot import {source}"), _arguments_of(source):
        module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    if dist.is_available() and dist.is_initialized():
        raise UserError(
            f"cannot use {source}: importing it makes a process group. Put what trains under "
            f'`if __name__ == "__main__":`'
        )
    with users_code(f"cannot find {name!r} in {source}"):  # modules may import on demand
        function = _looked_up(target, source, name, module)
    if not callable(function):
        raise UserError(f"--model {target}: {name!r} is no function but {shown(function)}")
    return function


def _looked_up(target: str, source: str, name: str, module: ModuleType) -> Any:
    try:
        return reduce(getattr, name.split("."), cast(Any, module))
    except AttributeError:
        raise UserError(f"--model {target}: {source} has no {name!r}") from None


@contextmanager
def users_code(doing: str) -> Generator[None]:
    """What runs inside prints to stderr, and its errors become one line.

    Raises:
        UserError: with the error's first line, and where in the user's code it was raised.
    """
    try:
        with _stdout_to_stderr():
            yield
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit, and what pytest skips with
        _raise_in_one_line(doing, error)


def _raise_in_one_line(doing: str, error: BaseException) -> NoReturn:
    text = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")[:300]
    if isinstance(error, SystemExit):
        text = f"SystemExit: it ends the process with {error.code!r}"
    hint = _WITHOUT_A_GPU if any(s in text.lower() for s in _SIGNS_OF_A_DEVICE) else ""
    raise UserError(f"{doing}: {text}{_place(error)}{hint}") from error


def _place(error: BaseException) -> str:
    """File and line of the innermost frame that is no installed package's, as " (at ...)"."""
    here, stdlib = str(Path(__file__).parents[2]), sysconfig.get_paths()["stdlib"]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        installed = frame.filename.startswith((here, stdlib, "<"))
        if not installed and "site-packages" not in frame.filename:
            return f" (at {os.path.relpath(frame.filename)}:{frame.lineno})"
    return ""


def _load_module(name: str) -> ModuleType:
    """As `python -c "import name"` finds it, in the current folder too."""
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """As `python path` finds the modules beside it, but without its arguments."""
    if not path.is_file():
        raise UserError(f"cannot import {path}: there is no such file")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up the module of their class
    spec.loader.exec_module(module)
    return module


@contextmanager
def _arguments_of(script: str) -> Generator[None]:
    """As if the script were run without arguments: some read theirs when they are imported."""
    kept, sys.argv = sys.argv, [script]
    try:
        yield
    finally:
        sys.argv = kept


@contextmanager
def _stdout_to_stderr() -> Generator[None]:
    """What Python, C and child processes write to stdout goes to stderr."""
    stdout, kept = sys.stdout, os.dup(1)
    stdout.flush()
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()  # some write to `sys.__stdout__`
        os.dup2(kept, 1)
        os.close(kept)
