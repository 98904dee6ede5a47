"""What policies remember, in the folders of `accelerator.save_state`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: dict[str, Any], /) -> None: ...


def register(accelerator: Any, find: Callable[[], Stateful | None], index: int) -> list[Any]:
    """Lets the accelerator save and load the state; returns what `.remove()` ends.

    Not `register_for_checkpointing`: accelerate refuses to load a checkpoint with another number of
    such objects, one from before distclip was used, and keeps them after `free_memory()`.

    Args:
        find: whose state it is, or None once that is gone.
        index: among the clippers of this accelerator, in the order in which they were made.
    """
    name = "distclip.bin" if index == 0 else f"distclip_{index}.bin"

    return [
        accelerator.register_save_state_pre_hook(_Save(accelerator, find, name)),
        accelerator.register_load_state_pre_hook(_Load(accelerator, find, name)),
    ]


class _Hook:
    def __init__(self, accelerator: Any, find: Callable[[], Stateful | None], name: str) -> None:
        self._accelerator, self._find, self._name = accelerator, find, name

    def __reduce__(self) -> Any:
        """A pickled accelerator has no clipper, and saves nothing of ours."""
        return _NoHook, ()


class _Save(_Hook):
    def __call__(self, models: object, weights: object, output_dir: str) -> None:
        if (clipper := self._find()) is not None:
            self._accelerator.save(clipper.state_dict(), Path(output_dir) / self._name)


class _Load(_Hook):
    def __call__(self, models: object, input_dir: str) -> None:
        if (clipper := self._find()) is not None:
            _load(clipper, Path(input_dir) / self._name)


class _NoHook:
    def __call__(self, *_: object) -> None: ...


def _load(clipper: Stateful, file: Path) -> None:
    if file.exists():
        clipper.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return
    groups = clipper.state_dict()["groups"].values()
    if any(state for policies in groups for state in policies.values()):
        warnings.warn(
            f"{file.parent} has no {file.name}, because it was saved without this clipper: the "
            f"weights are loaded, and the policy goes on with what it remembers now.",
            stacklevel=4,
        )
