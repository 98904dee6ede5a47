"""What a policy remembers, in a file of the Trainer's checkpoint folders.

The state that callbacks may put into "trainer_state.json" is not enough: it is JSON, and the
Trainer makes a new callback of it, which is not the one that the user holds.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist

from distclip.adapters.transformers.clipping import Clipping

FILE_NAME = "distclip.pt"


def save(clipping: Clipping, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    torch.save(clipping.state_dict(), os.path.join(folder, FILE_NAME))


def load(clipping: Clipping, folder: str, remembers: bool) -> None:
    """Restores what `save` wrote, on any number of ranks.

    Args:
        remembers: the policy has a state, and a missing file is worth a warning.

    Raises:
        ValueError: on every rank: the file cannot be read, or holds another policy's state.

    Collective: a broadcast from rank 0, because the file may be on its machine only.
    """
    path = os.path.join(folder, FILE_NAME)
    read: list[Any] = [None, None]
    if is_first := not _has_ranks() or dist.get_rank() == 0:
        read = _read(path)
    if _has_ranks():
        dist.broadcast_object_list(read, src=0)
    saved, error = cast("tuple[dict[str, Any] | None, str | None]", read)
    if error is not None:
        raise ValueError(
            f"cannot resume: {path} cannot be read as the state of a policy ({error}). Delete it "
            f"to begin with a policy that remembers nothing."
        )
    if saved is not None:
        try:
            clipping.load_state_dict(saved)
        except (TypeError, ValueError) as reason:
            raise ValueError(
                f"cannot resume from {path}: {reason} Delete the file to begin with a policy that "
                f"remembers nothing."
            ) from reason
    elif remembers and is_first:
        warnings.warn(
            f"There is no {FILE_NAME} in {folder}: it was saved without DistClip, and the policy "
            f"begins as before the first step.",
            stacklevel=2,
        )


def _read(path: str) -> list[Any]:
    """The state or None, and what is wrong with it or None."""
    if not os.path.exists(path):
        return [None, None]
    try:
        return [torch.load(path, map_location="cpu", weights_only=True), None]
    except Exception as error:  # every rank has to learn of it
        return [None, f"{type(error).__name__}: {error}".splitlines()[0]]


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
