"""Which parameters optimizers step beside those that a Clipper holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

from torch import Tensor
from torch.optim import Optimizer

from distclip.sharding.layout import LocalParam
from distclip.training.wrappers import params_of


class CheckedOptimizers:
    """What the optimizers given so far step beside what a Clipper holds; keeps none of them alive.

    Optimizers get parameters during training (`add_param_group`), and parameters are unfrozen.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def look_again(self) -> None:
        """Call it when the Clipper holds other parameters than before."""
        for each in self._seen:
            each.stepped = None

    def new_params(
        self, optimizers: Sequence[Optimizer], params: Sequence[LocalParam], scaled: bool
    ) -> list[Tensor]:
        """The parameters that these optimizers have begun to step since they were seen first.

        Only where they stepped nothing but the Clipper's parameters at that time: a Clipper may
        hold a part of what an optimizer steps.

        Args:
            params: those that the Clipper holds.
            scaled: the gradients still need a factor, and the Clipper must hold them all.

        Raises:
            ValueError: gradients would be left scaled, or be unscaled although a scaler does not
                know it.
        """
        stepped = params_of(optimizers)
        seen = next((each for each in self._seen if each.is_of(optimizers)), None)
        if seen is None or not seen.is_same(stepped):
            held = {id(param.param) for param in params}
            others = [param for param in stepped if id(param) not in held]
            covers = seen.covers if seen is not None else not any(map(_is_trained, others))
            self._seen = [each for each in self._seen if each.is_alive() and each is not seen]
            self._seen.append(
                seen := _Seen(tuple(map(weakref.ref, optimizers)), stepped, others, covers)
            )
        trained = [param for param in seen.others if _is_trained(param)]
        if trained and seen.covers:
            return trained
        if trained:
            _check_replaced(trained, stepped, params)
        if scaled:
            _check_same(trained, stepped, params)
        return []


@dataclass
class _Seen:
    """The optimizers of one call, and the parameters that they stepped.

    Attributes:
        stepped: None where they have to be compared with the Clipper's again.
        others: those that the Clipper does not hold.
        covers: when they were seen first, the Clipper held all that they trained.
    """

    optimizers: tuple[weakref.ref[Optimizer], ...]
    stepped: list[Tensor] | None
    others: list[Tensor]
    covers: bool

    def is_of(self, optimizers: Sequence[Optimizer]) -> bool:
        same_number = len(optimizers) == len(self.optimizers)
        return same_number and all(
            ref() is o for ref, o in zip(self.optimizers, optimizers, strict=True)
        )

    def is_alive(self) -> bool:
        return all(ref() is not None for ref in self.optimizers)

    def is_same(self, stepped: Sequence[Tensor]) -> bool:
        known = self.stepped
        return known is not None and len(stepped) == len(known) and all(map(is_, stepped, known))


def unheld_gradient(
    optimizers: Sequence[Optimizer], params: Sequence[LocalParam]
) -> ValueError | None:
    """The error where these step gradients, and nothing of what a Clipper holds.

    Call it where that has no gradient. A part of a model may lie on other ranks alone (FSDP1).
    """
    stepped = params_of(optimizers)
    if not {id(param) for param in stepped}.isdisjoint(id(param.param) for param in params):
        return None
    param = next((param for param in stepped if param.grad is not None), None)
    return None if param is None else _replaced(param)


def _check_replaced(
    others: Sequence[Tensor], stepped: Sequence[Tensor], params: Sequence[LocalParam]
) -> None:
    """Raises ValueError where an optimizer steps a parameter in the place of one that is held."""
    ids = {id(param) for param in stepped}
    left = [p.param for p in params if p.param.grad is None and id(p.param) not in ids]
    shapes = {param.shape for param in left if param.requires_grad}
    for other in others:
        if other.grad is not None and other.shape in shapes:
            raise _replaced(other)


def _replaced(param: Tensor) -> ValueError:
    return ValueError(
        f"cannot clip: the optimizer steps a parameter of shape {list(param.shape)} that the "
        f"Clipper does not hold, and what it holds instead has no gradient: others have taken the "
        f"places of those that the Clipper was made with (fully_shard, FSDP, parallelize_module, "
        f"`load_state_dict(assign=True)`). Make the Clipper after the model has been wrapped, or "
        f"pass the module instead of a list."
    )


def _is_trained(param: Tensor) -> bool:
    return param.requires_grad or param.grad is not None


def _check_same(
    others: Sequence[Tensor], stepped: Sequence[Tensor], params: Sequence[LocalParam]
) -> None:
    ids = {id(param) for param in stepped}
    left = [p.name for p in params if p.param.requires_grad and id(p.param) not in ids]
    if not left and not others:
        return
    if left:
        found = f"no optimizer given steps {left[0]!r}"
    else:
        shape = list(others[0].shape)
        found = f"{len(others)} parameters of the optimizer are not the Clipper's (shape {shape})"
    raise ValueError(
        f"cannot unscale and clip together: {found}. Some gradients would be left scaled, or be "
        f"unscaled although the scaler does not know it. Pass all optimizers of the parameters "
        f"that the Clipper holds, `[first, second]`; or call `scaler.unscale_(optimizer)` for each "
        f"before."
    )
