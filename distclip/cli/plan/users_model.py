"""The function that a user names, and the model that it makes on one simulated rank."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.cli.console import UserError
from distclip.clipper import Clipper
from distclip.sharding.stage_mesh import any_dtensor

# What a function returns: a model, the parts of a pipeline stage, or the Clipper of either.
Made: TypeAlias = nn.Module | list[nn.Module] | Clipper
Function: TypeAlias = Callable[..., Any]

SHARDED_AXES = ("fsdp", "dp_shard")
COPIED_AXES = ("dp", "ddp", "dp_replicate")
WITHOUT_A_GPU = (
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
    try:
        function = reduce(getattr, name.split("."), cast(Any, module))
    except AttributeError:
        raise UserError(f"--model {target}: {source} has no {name!r}") from None
    if not callable(function):
        raise UserError(f"--model {target}: {name!r} is no function but {_a(function)}")
    return function


def takes_mesh(function: Function, target: str) -> bool:
    """Whether to pass the mesh: to a function that needs one argument, or one named `mesh`.

    Raises:
        UserError: it needs more.
    """
    try:
        params = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions of C do not say it
        return False
    positional = [p for p in params if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [
        p
        for p in params
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1 or (needed and needed != positional[:1]):
        names = ", ".join(p.name for p in needed)
        raise UserError(
            f"--model {target}: it needs the arguments {names}. Write a function that takes the "
            f"DeviceMesh alone and returns the sharded model, or that takes nothing"
        )
    return bool(needed) or (bool(positional) and positional[0].name.endswith("mesh"))


def make_model(function: Function, target: str, mesh: DeviceMesh) -> Made:
    """What the function returns on this rank; a plain model is sharded by `fully_shard`.

    Raises:
        UserError: it raises, returns something else, or nobody knows how to shard what it returns.
    """
    pass_mesh = takes_mesh(function, target)
    with users_code(f"cannot make a model: {target} raised"), torch.device("meta"):
        made = function(mesh) if pass_mesh else function()
    if isinstance(made, list | tuple) and all(isinstance(part, nn.Module) for part in made):
        made = list(cast("list[nn.Module]", made))
    elif not isinstance(made, nn.Module | Clipper):
        raise UserError(
            f"--model {target}: it returned {_a(made)}, not an nn.Module, a list of them or a "
            f"distclip.Clipper"
        )
    if isinstance(made, nn.Module) and not pass_mesh and not any_dtensor(made.parameters()):
        with users_code(f"cannot shard the model of {target} with fully_shard"):
            _shard(made, mesh)
    return made


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 over the axis that is named for it. Other axes of these names hold copies."""
    from torch.distributed.fsdp import fully_shard

    sizes = dict(zip(cast("tuple[str, ...]", mesh.mesh_dim_names), mesh.mesh.shape, strict=True))
    axes = [axis for axis, size in sizes.items() if size > 1]
    unknown = [axis for axis in axes if axis not in (*SHARDED_AXES, *COPIED_AXES)]
    sharded = [axis for axis in axes if axis in SHARDED_AXES]
    if unknown or len(sharded) > 1:
        axis = unknown[0] if unknown else sharded[1]
        raise UserError(
            f"--mesh {axis}={sizes[axis]}: a plain model does not say how ranks along {axis!r} "
            f"share it. Write a function that takes the mesh, `def build(mesh): ...`, and returns "
            f"the model as you shard it"
        )
    if sharded:
        fully_shard(model, mesh=mesh[sharded[0]])


@contextmanager
def users_code(doing: str) -> Iterator[None]:
    """What runs inside prints to stderr, and its errors become one line.

    Raises:
        UserError: with the error's first line, and where in the user's code it was raised.
    """
    try:
        with _stdout_to_stderr():
            yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        _raise_in_one_line(doing, error)


def _raise_in_one_line(doing: str, error: BaseException) -> NoReturn:
    text = f"{type(error).__name__}: {error}".strip().partition("\n")[0].rstrip(": ")[:300]
    if isinstance(error, SystemExit):
        text = f"SystemExit: it ends the process with {error.code!r}"
    hint = WITHOUT_A_GPU if any(s in text.lower() for s in _SIGNS_OF_A_DEVICE) else ""
    raise UserError(f"{doing}: {text}{_place(error)}{hint}") from error


def _place(error: BaseException) -> str:
    """File and line of the innermost frame that is no installed package's, as " (at ...)"."""
    here, stdlib = str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"]
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
def _arguments_of(script: str) -> Iterator[None]:
    """As if the script were run without arguments: some read theirs when they are imported."""
    kept, sys.argv = sys.argv, [script]
    try:
        yield
    finally:
        sys.argv = kept


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What Python, C and child processes write to stdout goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
