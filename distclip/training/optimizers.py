"""Which parameters optimizers step, and stepping them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from distclip.norms import reduce
from distclip.norms.plan import Plan
from distclip.training import fused
from distclip.training import grad_scaler as amp

Optimizers: TypeAlias = Optimizer | Iterable[Optimizer]


def listed(given: Optimizers | None) -> list[Optimizer]:
    if given is None:
        return []
    # Wrappers of optimizers need not be `Optimizer`s.
    return [cast(Optimizer, given)] if hasattr(given, "param_groups") else list(cast("Iterable[Optimizer]", given))


def step(optimizer: Optimizer, scaler: GradScaler | None) -> None:
    if scaler is not None and scaler.is_enabled():
        amp.step(scaler, optimizer)
    else:
        optimizer.step()


def fold(optimizers: Sequence[Optimizer], plan: Plan) -> bool:
    """Whether these take one factor for all gradients that the plan holds, and for no other."""
    held = {id(h.param) for h in plan.params if h.param.grad is not None}
    return all(map(fused.folds, optimizers)) and held == {id(p) for p in _params(optimizers) if p.grad is not None}


def check_same_parameters(optimizers: Sequence[Optimizer], plan: Plan) -> None:
    """Raises ValueError, on every rank, unless these step what the plan holds, and nothing else.

    Collective: an all-gather of a short text.
    """
    for rank, difference in reduce.gathered(_difference(optimizers, plan), plan).items():
        if difference is not None:
            raise ValueError(
                f"cannot unscale and clip together: on rank {rank} {difference}, so that some gradients would be left "
                f"scaled, or be unscaled without the scaler's knowing. Pass all optimizers of the parameters that "
                f"the Clipper holds, `[first, second]`; or call `scaler.unscale_(optimizer)` for each before."
            )


def _difference(optimizers: Sequence[Optimizer], plan: Plan) -> str | None:
    stepped, held = {id(p) for p in _params(optimizers)}, {id(h.param) for h in plan.params}
    left = [h.name for h in plan.params if h.param.requires_grad and id(h.param) not in stepped]
    if left:
        return f"no optimizer given steps {left[0]!r}"
    return f"{len(stepped - held)} parameters of the optimizer are not the Clipper's" if stepped - held else None


def _params(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
