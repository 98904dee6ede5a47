"""What every adapter checks first: its framework, and that nothing else clips already."""

from __future__ import annotations

import re
import warnings
from collections.abc import MutableMapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary


class Framework(NamedTuple):
    """A framework that an adapter is for.

    Attributes:
        name: of the distribution, as pip has it.
        lowest, highest: the versions that the adapter was tested with, both included.
        options: those that pip needs for it.
    """

    name: str
    lowest: str
    highest: str
    options: str = ""


TRANSFORMERS = Framework("transformers", "5.23.0", "5.24.0")
ACCELERATE = Framework("accelerate", "1.15.0", "1.15.0")
LIGHTNING = Framework("lightning", "2.6.6", "2.6.6")
TORCHTITAN = Framework("torchtitan", "0.3.0", "0.3.0")
MEGATRON = Framework("megatron-core", "0.15.3", "0.16.1")
DEEPSPEED = Framework("deepspeed", "0.16.9", "0.19.8", options="--no-build-isolation ")

# What clips the gradients of an object: an optimizer, an engine. Weak: nothing is kept alive.
_clipped_by: MutableMapping[Any, str] = WeakKeyDictionary()


def import_framework(framework: Framework, module: str, stacklevel: int = 3) -> Any:
    """`module` of the framework; warns where its version is outside the tested ones.

    Raises:
        ImportError: the framework is missing.
    """
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the framework itself needs
        raise ImportError(
            f"cannot use distclip with {framework.name}: it is not installed. Install it with "
            f"`pip install {framework.options}{framework.name}=={framework.highest}`.",
            name=error.name,
        ) from error
    installed = _version_of(found, framework.name)
    if not _numbers(framework.lowest) <= _numbers(installed) <= _numbers(framework.highest):
        warnings.warn(
            f"distclip is tested with {framework.name} {framework.lowest} to {framework.highest}, "
            f"and this is {installed}: compare the norm that it reports with that of a run without "
            f"sharding before you trust it.",
            stacklevel=stacklevel,
        )
    return found


def claim(target: Any, owner: str) -> None:
    """Records that `owner` clips the gradients of an optimizer or an engine.

    Raises:
        ValueError: something does already.
    """
    if (other := _clipped_by.get(target)) is not None:
        again = "again" if other == owner else f"with {owner}"
        raise ValueError(
            f"cannot clip the gradients of this {type(target).__qualname__} {again}: {other} does "
            f"already, and they would be clipped twice. Remove one of the two, or detach it first."
        )
    _clipped_by[target] = owner


def release(target: Any) -> None:
    """Ends what `claim` has recorded; does nothing where there is nothing."""
    _clipped_by.pop(target, None)


def _version_of(module: ModuleType, distribution: str) -> str:
    known = getattr(module, "__version__", None)  # a checkout that pip has not installed has it
    try:
        return known or version(distribution)
    except PackageNotFoundError:
        return "of an unknown version"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
