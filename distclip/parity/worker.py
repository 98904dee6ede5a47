"""What one rank does: builds, shards, steps, clips, and shows its gradients, each when asked."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from distclip.parity.clips import ClipFunction, as_number
from distclip.parity.pieces import Gradients, Piece, gradient_pieces
from distclip.parity.whole import Build, Step, build_seeded, digest, map_floats, seed_step

INVALID = "InvalidTask: "


class InvalidTask(Exception):
    """What a user has passed cannot be compared at all."""


class Task(NamedTuple):
    """What to run; functions are those of modules, which other processes can import.

    Attributes:
        layout: `model -> sharded model`, or another object that `steps` and `clip` understand.
        steps: each `(model, rank, world_size) -> loss or None`.
    """

    build: Build
    layout: Any
    steps: Sequence[Step]
    clip: ClipFunction | None
    gradients: Gradients | None
    seed: int


class Worker:
    """One rank. Every method is called on all ranks at once, and each is waited for."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.model: Any = None
        self.task: Any = None

    def prepare(self, pickled: bytes) -> str:
        """Builds and shards. Returns the digest of the weights before.

        Raises:
            InvalidTask: this process cannot import the functions, or the layout returned nothing
                that can be read.
        """
        try:
            self.task = task = pickle.loads(pickled)  # noqa: S301  (of the process that started this one)
        except Exception as error:
            raise InvalidTask(
                f"cannot run the functions on the ranks: {error}. Each rank is another process. "
                f"Define them in a file that it can import, not in a notebook or a shell."
            ) from error
        model = build_seeded(task.build, task.seed)
        before = digest(model)
        self.model = task.layout(model)
        if self.model is None:
            raise InvalidTask(
                "cannot compare this layout: it returned None. Return the sharded model, also "
                "where it was sharded in place."
            )
        if task.gradients is None and not isinstance(self.model, nn.Module):
            raise InvalidTask(
                f"cannot read gradients of what this layout returned: it is a "
                f"{type(self.model).__qualname__} and no nn.Module. Return the sharded module, or "
                f"pass `gradients=`, a function that returns whole gradients by name."
            )
        return before

    def step(self, index: int, nonfinite: bool) -> list[Piece]:
        """Runs one step, on one rank with NaN in its outputs. Returns the gradients."""
        if hasattr(self.model, "zero_grad"):
            self.model.zero_grad(set_to_none=True)
        seed_step(self.task.seed, index)
        hooks = self._poison() if nonfinite else []
        loss = self.task.steps[index](self.model, self.rank, self.world_size)
        if isinstance(loss, Tensor):
            (loss * math.nan if nonfinite else loss).backward()
        for hook in hooks:
            hook.remove()
        return self.gradients()

    def clip(self, max_norm: float) -> float | None:
        return as_number(self.task.clip(self.model, max_norm))

    def gradients(self) -> list[Piece]:
        return gradient_pieces(self.model, self.task.gradients)

    def _poison(self) -> list[Any]:
        """For steps that call backward themselves: the model's outputs become NaN."""
        if not isinstance(self.model, nn.Module):
            return []

        def to_nan(module: nn.Module, args: Any, output: Any) -> Any:
            return map_floats(output, lambda tensor: tensor * math.nan)

        return [self.model.register_forward_hook(to_nan)]
