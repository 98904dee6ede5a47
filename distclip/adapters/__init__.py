"""distclip for trainers and optimizers; each imports its framework only when used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distclip.adapters import deepspeed as deepspeed
from distclip.adapters.megatron import MegatronLayouts as MegatronLayouts
from distclip.adapters.megatron import megatron_layouts as megatron_layouts
from distclip.adapters.pytorch import replacing_torch as replacing_torch

# Modules whose import imports the framework: when they are first named.
_ON_USE = ("accelerate", "lightning", "torchtitan", "transformers")


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
