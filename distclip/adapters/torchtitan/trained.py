"""What a trainer of torchtitan trains, reads from its config, and saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.adapters.torchtitan.skipped_steps import SkippedSteps
from distclip.arguments import kind_of, shown
from distclip.clipper import Clipper
from distclip.policies import TorchClipNorm
from distclip.sharding.fsdp2 import reshard
from distclip.sharding.read import named_parameters


@dataclass(eq=False)
class Trained:
    """What a trainer trains. It does not refer to the trainer, which may go.

    Attributes:
        params: as `Clipper` takes them, under their names in the whole model.
        ids: of the parameters that the trainer passes to be clipped.
        mesh: over all stages of a pipeline; None without one.
    """

    params: nn.Module | list[tuple[str, nn.Parameter]]
    ids: frozenset[int]
    mesh: DeviceMesh | None
    pp_mesh: DeviceMesh | None
    optimizers: Any
    clipper: Clipper | None = None
    skips: SkippedSteps = field(default_factory=SkippedSteps)

    @classmethod
    def read(cls, trainer: Any) -> Trained:
        needed = ("model_parts", "parallel_dims", "optimizers")
        if missing := [name for name in needed if not hasattr(trainer, name)]:
            raise TypeError(
                f"cannot add {shown(trainer)}: it is {kind_of(trainer)}, without {missing}, and "
                f"nothing says what is trained on which ranks. Pass torchtitan's trainer, or an "
                f"engine that has these attributes."
            )
        parts: list[nn.Module] = list(trainer.model_parts)
        for part in parts:
            reshard(part)
        named = [pair for part in parts for pair in named_parameters(part)]
        ids = frozenset(id(param) for _, param in named)
        pp_mesh = trainer.parallel_dims.get_optional_mesh("pp")
        # The one mesh that has all ranks on axes of their own under each of its backends.
        axes = ["pp", "batch", "cp", "tp"]
        mesh = None if pp_mesh is None else trainer.parallel_dims.get_activated_mesh(axes)
        params = parts[0] if len(parts) == 1 else named
        return cls(params, ids, mesh, pp_mesh, trainer.optimizers)


def states_of(trainer: Any) -> dict[str, Any]:
    """What a trainer saves with its checkpoints; without any where it saves none."""
    return getattr(getattr(trainer, "checkpointer", None), "states", {})


def rule_of(trainer: Any) -> TorchClipNorm | None:
    """The rule in the config of torchtitan's trainers; None for an engine without one."""
    training = getattr(getattr(trainer, "config", None), "training", None)
    return None if training is None else TorchClipNorm(training.max_norm)


def remembers(clipper: Clipper) -> bool:
    """Whether its policies have a state."""
    return any(any(states.values()) for states in clipper.state_dict()["groups"].values())


def check_steps_after_backward(stepped: Any) -> None:
    if any("InBackward" in kind.__name__ for kind in type(stepped).__mro__):
        raise ValueError(
            f"cannot clip for a {type(stepped).__qualname__}: it steps each parameter during "
            f"backward, before the norm of all gradients is known, and drops the gradient. Turn "
            f"the early step in backward off in the config of the optimizer."
        )
