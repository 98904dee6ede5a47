"""What happens where a policy returns a limit that is none: negative, NaN, or of another form.

Scaled by such a limit, gradients would be turned around or become NaN while their norm is finite.
A limit for the whole model is the same on every rank, and all raise together. One for a tensor or
a unit may be known to one rank only: its gradient becomes zero. In the next step this rank adds a
NaN to the all-reduce of the norms, and all ranks raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.arguments import kind_of, shown
from distclip.nonfinite import SkipCounter
from distclip.norms import power_sums
from distclip.norms.plan import ParamGroup, Plan
from distclip.norms.shared_errors import gather_objects, rank_group
from distclip.policies import Policy, never_negative
from distclip.torch_private import has_values, host_has_values

# float32 has room for it, and for what fused optimizers take: its reciprocal, divided by a scale.
_LARGEST_COEFFICIENT = 2.0**100


class Limits(NamedTuple):
    """The limits that a policy returned.

    Attributes:
        limits: float64. Where one is none: zero if this rank alone may know it, else NaN.
        valid: whether all are 0 or above, or the norm is not finite; a bool scalar. None where
            that is known.
    """

    limits: Tensor
    valid: Tensor | None


def read_limits(
    returned: Any,
    norms: Tensor,
    group: ParamGroup,
    plan: Plan,
    policy: Policy[Any],
    is_finite: Callable[[], Tensor],
) -> Limits:
    """Checks what `policy.limit` returned for `norms`; no wait for the device.

    Raises:
        TypeError: it is no real tensor of the shape of `norms`.
    """
    is_real = isinstance(returned, Tensor) and returned.is_floating_point()
    if not is_real or returned.shape != norms.shape:
        raise TypeError(
            f"cannot clip group {group.name!r} with {group.description}: its `limit` returned "
            f"{shown(returned)}, {kind_of(returned)}, but there is one limit for each norm. Return "
            f"a float64 tensor of the shape of `norms`, {list(norms.shape)}, such as "
            f"`torch.full_like(norms, 1.0)`, or None to measure only."
        )
    limits = returned.double()
    on_host = host_has_values(limits)
    if bool((limits >= 0).all()) if on_host else never_negative(policy):
        # A policy of one's own may write to its tensor later, and the report would show that.
        return Limits(limits.clone() if on_host else limits, None)
    is_limit, finite = limits >= 0, is_finite()
    valid = is_limit.all() | ~finite
    if not is_shared(group, plan):
        return Limits(torch.where(is_limit | ~finite, limits, 0.0), valid)
    return Limits(torch.where(is_limit, limits, math.nan), valid)


def raising_coefficients(norms: Tensor, limits: Tensor) -> Tensor:
    """limit / norm, elementwise, at most 2**100, for a policy that raises; NaN where either is NaN.

    1 where a norm is 0, or a limit infinite, also where the other is NaN. No wait for the device.

    Shapes: as `Backend.coefficients`.
    """
    stays = (norms == 0) | (limits == math.inf)
    return (limits / norms).clamp(max=_LARGEST_COEFFICIENT).masked_fill(stays, 1.0)


def is_shared(group: ParamGroup, plan: Plan) -> bool:
    """Whether every rank knows all limits of the group."""
    return group.units is None or plan.reduce_mesh is None


def make_nan_(payload: Tensor, power: power_sums.Power, where: Tensor) -> None:
    """Makes the total norm, which the payload begins with, NaN on all ranks if `where` is true."""
    nan = power_sums.partials(payload.new_full((1,), math.nan), power)[0]
    total = payload[: len(nan)]
    total.copy_(torch.where(where, nan, total))


class LimitChecks:
    """Raises on all ranks together where a limit was none."""

    def __init__(self, plan: Plan, policies: Sequence[Policy[Any]]) -> None:
        self._plan = plan
        self._late = SkipCounter(0)
        shared = [is_shared(group, plan) for group in plan.groups]
        self._asks_ranks = not all(shared) and not all(map(never_negative, policies))
        self._found: str | None = None  # in the last step, on this rank
        self.invalid: Tensor | None = None  # whether that was so; on the device

    def check(self, valid: Sequence[Tensor | None], is_finite: Callable[[], Tensor]) -> None:
        """Raises ValueError: now on a CPU, some steps later on an accelerator.

        Args:
            valid: of each group, as in `Limits`.
            is_finite: whether the norm is; not asked for where it does not matter.

        Collective: where the norm is not finite and some rank alone may know why, an all-gather of
            a short text; none on accelerators.
        """
        found, self._found, self.invalid = self._found, None, None
        groups = zip(self._plan.groups, valid, strict=True)
        here = [(group, each) for group, each in groups if each is not None]
        if not here and not self._asks_ranks:
            return
        finite = is_finite()
        if not has_values(finite):
            return
        if host_has_values(finite):
            self._check_now(here, finite, found)
            return
        shared = [each for group, each in here if is_shared(group, self._plan)]
        alone = [~each for group, each in here if not is_shared(group, self._plan)]
        if alone:
            self.invalid = torch.stack(alone).any()
        if shared and self._late.count_(torch.stack(shared).all()):
            raise _error(_text([group for group, _ in here]), "a few steps ago")

    def _check_now(
        self, here: Sequence[tuple[ParamGroup, Tensor]], finite: Tensor, found: str | None
    ) -> None:
        if self._asks_ranks and not bool(finite):
            texts = gather_objects(found, rank_group(self._plan))
            if ranks := [rank for rank, text in texts.items() if text is not None]:
                raise _error(str(texts[ranks[0]]), f"in the last step, on the ranks {ranks}")
        invalid = [group for group, valid in here if not bool(valid)]
        if shared := [group for group in invalid if is_shared(group, self._plan)]:
            raise _error(_text(shared), "now")
        if invalid:
            self._found, self.invalid = (
                _text(invalid),
                torch.ones((), dtype=torch.bool, device="cpu"),
            )


def _text(groups: Sequence[ParamGroup]) -> str:
    return ", ".join(f"group {group.name!r} with {group.description}" for group in groups)


def _error(groups: str, when: str) -> ValueError:
    return ValueError(
        f"cannot clip {groups}: its `limit` returned a negative number or NaN ({when}), although "
        f"the norm is finite. Scaled by it, the gradients would be turned around or become NaN. "
        f"Return limits of 0 or above, and check what the policy remembers."
    )
