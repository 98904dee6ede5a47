"""What one step found, and what is to happen to the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from distclip import kernels
from distclip.arguments import check_function
from distclip.nonfinite import OnNonFinite, coefficient_under, limit_under
from distclip.norms.measure import TensorLists
from distclip.norms.plan import ParamGroup, Plan
from distclip.parameters import as_scalar, gradients_from
from distclip.policies import Scope
from distclip.report import Report
from distclip.scaling import check_real, clamp_, is_one, scale_, scale_units_, zero_
from distclip.torch_private import has_values, outside_of_graphs


class GroupClip(NamedTuple):
    """What a policy says about its parameter group.

    Attributes:
        norm: of the whole group, float64.
        limits, coefficients: float64; [] or [num_units]. Limits are None where the policy only
            measures.
        next_state: of the policy, if this step counts.
        valid: whether the limits are some; see `limits.Limits`.
        accepts: whether the step may be taken; a bool scalar. None where the policy never vetoes.
    """

    norm: Tensor
    limits: Tensor | None
    coefficients: Tensor
    next_state: Any
    valid: Tensor | None = None
    accepts: Tensor | None = None


@dataclass
class Decision:
    """What one step found, and what is to happen to the gradients. `Clipper.decide` makes it.

    Attributes:
        report: the figures of the step; see `Report`.
        total_norm: over all groups, before clipping; float64 scalar.
        vetoed: whether a policy leaves out the step although the norm is finite; a bool scalar on
            the device. None where no policy can.
    """

    plan: Plan = field(repr=False)
    gradients: Sequence[Tensor | None] = field(repr=False)
    tensor_lists: Sequence[TensorLists | None] = field(repr=False)
    clips: Sequence[GroupClip] = field(repr=False)
    total_norm: Tensor
    scale: Tensor | None
    mode: OnNonFinite
    report: Report
    in_grad: bool = True  # the gradients are those in `.grad`
    on_apply: Callable[[Tensor], None] | None = field(default=None, repr=False)
    known_finite: Tensor | None = field(default=None, repr=False)
    vetoed: Tensor | None = field(default=None, repr=False)
    _applied: bool = field(default=False, repr=False)

    @outside_of_graphs
    @torch.no_grad()
    def apply_(
        self,
        gradient: Callable[[Tensor], Tensor | None] | None = None,
        scale: float | Tensor | None = None,
    ) -> None:
        """Multiplies the gradients by what was decided, in place. Call it once, before they change.

        Args:
            gradient: where the gradient of a parameter lies now, for trainers that move or copy
                gradients after `decide`; None for parameters to leave out. With it, `apply_` may
                be called for some of the parameters after the others.
            scale: with `gradient`, a factor that these gradients still need.

        Raises:
            RuntimeError: the gradients were scaled before.
            ValueError: `scale` without `gradient`, a complex gradient that would be clamped, or one
                that `gradient` returns and whose elements share memory.
        """
        check_function("gradient", gradient, "`parameter -> its gradient now`, or None")
        if gradient is None:
            if scale is not None:
                raise ValueError(
                    "cannot apply a decision with scale= alone: the gradients that were measured "
                    "get the scale that `decide` was given. Pass `scale` to `decide`, or pass "
                    "`gradient=` as well if other tensors need another factor."
                )
            if self._applied:
                raise RuntimeError(
                    "cannot apply this decision twice: the gradients have been multiplied by its "
                    "coefficient already, and would be scaled down again. Call `decide` for each "
                    "step."
                )
            self._write_(self.gradients, self.tensor_lists, self.scale)
            self.take_effect()
            return
        factor = None if scale is None else as_scalar(scale, self.plan.device)
        gradients = gradients_from(gradient, self.plan.params)
        self._write_(gradients, [None] * len(self.clips), factor)

    def take_effect(self) -> None:
        """Marks the gradients as scaled, for a scaler too: `apply_` or an optimizer did it."""
        self._applied = True
        if self.on_apply is not None:
            self.on_apply(self.found_inf)

    @property
    def finite(self) -> Tensor:
        """Whether the total norm is neither NaN nor infinite; a bool scalar on the device."""
        known = self.known_finite
        return norm_is_finite(self.total_norm, self.plan) if known is None else known

    @property
    def accepted(self) -> Tensor:
        """Whether the norm is finite and no policy vetoes the step; a bool scalar on the device."""
        return self.finite if self.vetoed is None else self.finite & ~self.vetoed

    @property
    def found_inf(self) -> Tensor:
        """1 where a GradScaler leaves out the step, which is not `accepted`; float32."""
        return (~self.accepted).float()

    @property
    def is_known_nonfinite(self) -> bool:
        """Whether the total norm is NaN or infinite, which waits for it; not if it has no value."""
        return has_values(self.finite) and not bool(self.finite)

    @property
    def is_left_out(self) -> bool:
        """Whether a step without a scaler is left out; waits for the norm where one may be."""
        skip = self.skip(False)
        return skip is not None and has_values(skip) and bool(skip)

    def skip(self, scaled: bool) -> Tensor | None:
        """1 where the optimizer's step is to be left out; None where it never is.

        Args:
            scaled: a scaler, which skips such steps, is in use.
        """
        if scaled or self.mode == "skip":
            return self.found_inf
        return None if self.vetoed is None else self.vetoed.float()

    def factor_of(self, group: int) -> Tensor | None:
        """What the gradients of a group with Scope.MODEL are multiplied by, None for nothing."""
        return self._factor(self.clips[group], self.scale)

    def apply_without(self, params: Container[int]) -> None:
        """`apply_`, but for gradients of these parameters, given by id, which optimizers multiply.

        The gradients are those in `.grad`.
        """
        gradients, lists = list(self.gradients), list(self.tensor_lists)
        for k, group in enumerate(self.plan.groups):
            members = range(*group.members.indices(len(gradients)))
            if mine := [i for i in members if id(self.plan.params[i].param) in params]:
                lists[k] = None
                for i in mine:
                    gradients[i] = None
        self._write_(gradients, lists, self.scale)
        self.take_effect()

    def next_policy_states(self, states: Sequence[Any]) -> list[Any]:
        """The policies' states after the step: the old ones where it is not `accepted`."""
        if not any(states):  # none has a field
            return list(states)
        accepted, pairs = self.accepted, zip(self.clips, states, strict=True)
        return [_where(accepted, clip.next_state, state) for clip, state in pairs]

    def _factor(self, clip: GroupClip, scale: Tensor | None) -> Tensor | None:
        if clip.limits is None and scale is None:
            return None
        factor = clip.coefficients if scale is None else clip.coefficients * scale
        return self._under_mode(factor)

    def _under_mode(self, factor: Tensor) -> Tensor:
        if self.mode == "propagate" and self.vetoed is None:
            return factor
        return coefficient_under(self.mode, factor, self.finite, self.vetoed)

    def _write_(
        self,
        gradients: Sequence[Tensor | None],
        tensor_lists: Sequence[TensorLists | None],
        scale: Tensor | None,
    ) -> None:
        for group, clip in zip(self.plan.groups, self.clips, strict=True):
            if group.scope is Scope.ELEMENT and clip.limits is not None:
                check_real(gradients[group.members])
        for group, clip, known in zip(self.plan.groups, self.clips, tensor_lists, strict=True):
            grads = gradients[group.members]
            if group.units is None:
                self._write_whole_(grads, known, group, clip, scale)
            elif (factors := self._factor(clip, scale)) is not None:
                scale_units_(group.units, grads, factors)
        if self.mode == "zero":
            zero_(_tensor_lists(gradients), ~self.finite)

    def _write_whole_(
        self,
        grads: Sequence[Tensor | None],
        known: TensorLists | None,
        group: ParamGroup,
        clip: GroupClip,
        scale: Tensor | None,
    ) -> None:
        """Writes a group without units. It looks for their memory only if it writes."""
        clamps = group.scope is Scope.ELEMENT and clip.limits is not None
        factor = self._factor(clip, scale)
        if group.scope is Scope.ELEMENT:
            factor = None if scale is None else self._under_mode(scale)
        if factor is not None and is_one(factor):
            factor = None
        if factor is None and not clamps:
            return
        lists = _tensor_lists(grads) if known is None else known
        if not lists:
            return
        if factor is not None:
            scale_(lists, factor)
        if clamps:
            limit = cast(Tensor, clip.limits)
            clamp_(lists, limit_under(self.mode, limit, lambda: self.finite, self.vetoed))


def norm_is_finite(total: Tensor, plan: Plan) -> Tensor:
    """Whether the norm is, in the dtype in which it is reported; a bool scalar."""
    return total.to(plan.norm_dtype) < math.inf  # two operations; `isfinite` is four


def _tensor_lists(gradients: Sequence[Tensor | None]) -> TensorLists:
    return kernels.tensor_lists([grad for grad in gradients if grad is not None])


def _where(accepted: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(accepted.to(new.device), new, old)
    return type(new)(*(_where(accepted, a, b) for a, b in zip(new, old, strict=True)))
