"""What users pass to `parity`, checked before any process starts."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from multiprocessing import get_all_start_methods
from typing import Any, TypeVar, cast

import torch

from distclip.arguments import as_number, kind_of, shown
from distclip.parity.clips import DEFAULT, Clip, PolicyClip, is_policy
from distclip.parity.whole import Step

T = TypeVar("T")


def as_steps(step: Any) -> tuple[Step, ...]:
    """One function or a sequence of functions, as a tuple."""
    steps = tuple(cast("Sequence[Any]", step)) if isinstance(step, Sequence) else (step,)
    for each in steps:
        check_sendable("step", each, "(model, rank, world_size) -> loss")
    if not steps:
        raise ValueError("cannot compare without a step: `step` is empty. Pass a function.")
    return steps


def as_layouts(layouts: Any) -> dict[str, Any]:
    return _named("layouts", layouts, "model -> sharded model")


def as_clips(clips: Any) -> dict[str, Clip]:
    """Functions, policies and `Clip`s by name, each as a `Clip`."""
    if clips is None:
        return DEFAULT
    given = _mapping("clips", clips)
    return {name: _as_clip(name, clip) for name, clip in given.items()}


def _as_clip(name: str, clip: Any) -> Clip:
    if is_policy(clip):
        clip = Clip(PolicyClip(clip), clip.norm_type, clip)
    if isinstance(clip, type):
        raise TypeError(
            f"cannot use clips[{name!r}]={shown(clip)}: it is {kind_of(clip)}. Pass a function, or "
            f"an instance, such as distclip.ZClip()."
        )
    if not isinstance(clip, Clip):
        clip = Clip(clip)
    check_sendable(f"clips[{name!r}]", clip.function, "(model, max_norm) -> total norm")
    return clip


def check_sendable(name: str, function: Any, instead: str) -> None:
    """Raises unless other processes can import `function`.

    Raises:
        TypeError: it is no function.
        ValueError: it has no name in a module: a lambda, or a function inside another.
    """
    if not callable(function):
        raise TypeError(
            f"cannot use {name}={shown(function)}: it is {kind_of(function)} and cannot be called. "
            f"Pass a function, `{instead}`."
        )
    try:
        pickle.dumps(function)
    except Exception as error:
        raise ValueError(
            f"cannot send {name} to the ranks: {str(error).splitlines()[0]}. Each rank is another "
            f"process, which imports it. Define `{instead}` with `def` at the top of a module; "
            f"`functools.partial` of such a function works too."
        ) from error


def as_whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"cannot compare with {name}={shown(value)}: it is {kind_of(value)}. Pass a whole "
            f"number of at least {least}."
        )
    return value


def as_positive(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(
            f"cannot compare with {name}={number!r}: it must be above 0 and finite. Pass a "
            f"positive number."
        )
    return number


def check_dtype(dtype: Any) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"cannot use dtype={shown(dtype)}: it is {kind_of(dtype)}. Pass a torch.dtype, such as "
            f"torch.bfloat16, or None."
        )


def check_start_method(method: Any) -> None:
    if method not in get_all_start_methods() or method == "fork":
        raise ValueError(
            f"cannot start ranks by start_method={shown(method)}: threads of torch do not survive "
            f'a fork, and nothing else of that name is known here. Pass "spawn" or "forkserver".'
        )


def _named(name: str, given: Any, instead: str) -> dict[str, Any]:
    for key, function in (mapping := _mapping(name, given)).items():
        check_sendable(f"{name}[{key!r}]", function, instead)
    return mapping


def _mapping(name: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        mapping = dict(cast("Mapping[Any, Any]", given))
        if mapping and all(isinstance(key, str) for key in mapping):
            return mapping
    raise TypeError(
        f"cannot use {name}={shown(given)}: it is {kind_of(given)}. Pass a dict with at least one "
        f"function under a name, which stands in the table."
    )
