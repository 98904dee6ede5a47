"""Other code in torch's clipping functions, and back again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distclip.sharding import fsdp1


class Functions(Protocol):
    """What takes the place of torch's functions, with their arguments in their order."""

    clip_grad_norm_: Callable[..., Tensor]
    get_total_norm: Callable[..., Tensor]
    clip_grads_with_norm_: Callable[..., None]
    clip_grad_value_: Callable[..., None]


_running: Functions | None = None  # inside a block


def running() -> Functions:
    assert _running is not None
    return _running


@contextmanager
def replaced_by(functions: Functions) -> Generator[None]:
    """Runs `functions` in the place of torch's until the block ends.

    An assignment to `torch.nn.utils.clip_grad_norm_` would miss every name imported before. So the
    function objects stay, and only their code changes.

    Raises:
        ValueError: inside such a block.
        RuntimeError: this version of torch has other arguments.
    """
    global _running  # noqa: PLW0603 - torch's functions are global as well
    if _running is not None:
        raise ValueError(
            "cannot replace torch's functions again: they are distclip's already, and the mesh of "
            "this call would be ignored. Leave the other `replacing_torch` block first; under "
            "`python -m distclip.run` there is one."
        )
    each = _replacements()
    for one in each:
        _check_arguments(one)
    _running = functions
    before = [_exchange(one.inner, one.ours.__code__) for one in each]
    try:
        yield
    finally:
        for one, code in zip(each, before, strict=True):
            _exchange(one.inner, code)
        _running = None


class _Replacement(NamedTuple):
    inner: Any  # both are functions: `FunctionType`
    ours: Any


def _replacements() -> list[_Replacement]:
    """The functions inside torch's decorators, and what takes the place of their code."""
    utils = torch.nn.utils
    each: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (utils.clip_grad_norm_, _clip_grad_norm_),
        (utils.get_total_norm, _get_total_norm),
        (utils.clip_grads_with_norm_, _clip_grads_with_norm_),
        (utils.clip_grad_value_, _clip_grad_value_),
    ]
    if (fsdp := fsdp1.wrapper_class()) is not None:
        each.append((fsdp.clip_grad_norm_, _clip_module))
    return [_Replacement(inspect.unwrap(theirs), ours) for theirs, ours in each]


def _check_arguments(one: _Replacement) -> None:
    """Raises where torch has other arguments: ours would take one for another."""
    if not isinstance(one.inner, FunctionType):
        raise RuntimeError(
            f"cannot replace torch's {one.ours.__name__[1:]}: something has put {one.inner!r} in "
            f"its place, which is no function. Enter `replacing_torch` before that, or call "
            f"distclip's functions instead."
        )
    theirs, ours = (f.__code__.co_varnames[: f.__code__.co_argcount] for f in one)
    if theirs != ours or one.inner.__closure__ is not None:
        raise RuntimeError(
            f"cannot replace torch's {one.inner.__qualname__}: torch {torch.__version__} has it "
            f"with the arguments {theirs}, and distclip knows it with {ours}. Call distclip's "
            f"functions instead."
        )


def _exchange(function: Any, code: CodeType) -> CodeType:
    """Gives a function other code, and returns what it had."""
    before, function.__code__ = function.__code__, code
    return before


# The code of these runs as torch's: with the globals of torch's modules, and torch's defaults. Each
# therefore imports what it names, and has torch's arguments.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownArgumentType=false


def _clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach):
    from distclip.adapters.torch_functions import running

    return running().clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def _clip_module(self, max_norm, norm_type):
    from distclip.adapters.torch_functions import running

    return running().clip_grad_norm_(self, max_norm, norm_type, False, None)


def _get_total_norm(tensors, norm_type, error_if_nonfinite, foreach):
    from distclip.adapters.torch_functions import running

    return running().get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)


def _clip_grads_with_norm_(parameters, max_norm, total_norm, foreach):
    from distclip.adapters.torch_functions import running

    running().clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)


def _clip_grad_value_(parameters, clip_value, foreach):
    from distclip.adapters.torch_functions import running

    running().clip_grad_value_(parameters, clip_value, foreach)
