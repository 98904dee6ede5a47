"""Clipping in hooks of backward that step an optimizer for each parameter, and free its gradient.

Each hook clips what its optimizer is about to step. What it measured is kept: the norms of a whole
step are reduced once, in `end_step`, at a place that the ranks reach in the same order. In a hook
the ranks communicate only where they share one tensor, which all of them step together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip import step as clip_step
from distclip import torch_private
from distclip.decision import Decision
from distclip.norms.make_plan import plan_of_members
from distclip.norms.measure import NormBuffer, measure, with_tensors
from distclip.norms.plan import Plan
from distclip.parameters import check_dense
from distclip.policies import ClipNorm, Scope
from distclip.report import Report
from distclip.scaling import check_writable
from distclip.sharding.local_tensors import any_unreduced, local_gradients
from distclip.torch_private import has_values, outside_of_graphs
from distclip.training import backward_checks as checks
from distclip.training.calls import Calls
from distclip.training.optimizers import HiddenGradients
from distclip.training.wrappers import params_of


class BackwardClipper:
    """What `Clipper.attach_in_backward` returns.

    Attributes:
        report: of the latest step; None before the first.
    """

    report: Report | None = None

    def __init__(self, optimizers: Sequence[Optimizer], calls: Calls) -> None:
        _check(optimizers, calls)
        self._calls, self._held = calls, calls.held
        plan = calls.held.plan
        # What policies of the whole model limit by, and what the others know of the whole model.
        self._coefficients: list[Tensor | None] = [None] * len(plan.groups)
        self._norms: list[Tensor | None] = [None] * len(plan.groups)
        self._buffers = [NormBuffer(group, plan) for group in plan.groups]
        self._stepped: set[int] = set()
        self._fault: Exception | None = None
        self._removed = False
        index = {id(param.param): i for i, param in enumerate(plan.params)}
        self._covered = {i for p in params_of(optimizers) if (i := index.get(id(p))) is not None}
        self._hooks = [
            _Hook(each, self._parts(each, index), self._before, self._clip) for each in optimizers
        ]
        calls.are_in_backward = True

    @outside_of_graphs
    @torch.no_grad()
    def end_step(self, step: int | None = None) -> Report:
        """Ends a step: reduces its norms, and asks the policies for the next. Returns the report.

        Call it on every rank after each backward in which optimizers may step, in a loop that is
        otherwise as it was. `report.total_norm` is the norm before clipping of all gradients that
        were stepped since the last call; `report.coefficient` is what they were multiplied by, for
        limits per tensor the smallest on this rank, and during the warm-up of `AdaGC` that of the
        loop without hooks.

        Args:
            step: as `Clipper.clip_` has it.

        Raises:
            NonFiniteGradientError: as `Clipper.clip_`.
            ValueError: on every rank, where a hook of some rank could not clip, a gradient was
                accumulated and never stepped, or parameters train that have no optimizer.
            LayoutError: as `Clipper.clip_`.

        Collective: one all-reduce of a few numbers; none where nothing is sharded.
        """
        held, nothing = self._held, [None] * len(self._held.plan.params)
        fault = self._fault or checks.left_out(
            held.plan, self._covered, self._stepped, held.changed()
        )
        measured = [buffer.measurement(nothing) for buffer in self._buffers]
        if held.plan.tensor_groups:
            measured = with_tensors(measured, nothing, held.plan)
        self._fault = None
        self._stepped.clear()
        for buffer in self._buffers:
            buffer.clear_all()
        decision = self._calls.end_step(measured, fault, step)
        self.report = self._applied(decision)
        counts = decision.finite & (decision.total_norm > 0)
        for i, clip in enumerate(decision.clips):
            if held.plan.groups[i].scope is Scope.MODEL:
                self._coefficients[i] = _next(counts, clip.coefficients, self._coefficients[i], 1.0)
            self._norms[i] = _next(counts, clip.norm, self._norms[i], 0.0)
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs of the last one, beside `clipper.state_dict()`.

        The same on every rank (of a pipeline stage), however many ranks share the model.
        """
        names = [group.name for group in self._held.plan.groups]
        saved = {"coefficients": self._coefficients, "norms": self._norms}
        return {
            key: {
                n: each.clone() for n, each in zip(names, numbers, strict=True) if each is not None
            }
            for key, numbers in saved.items()
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the parameter groups are others, or a number cannot be one of the state.
                Nothing is loaded then.
            TypeError: `saved` is no dictionary.
        """
        plan = self._held.plan
        names = [group.name for group in plan.groups]
        self._coefficients, self._norms = checks.read_state(saved, names, plan.device)

    def remove(self) -> None:
        """Ends it. The optimizers are as they were before."""
        if not self._removed:
            for hook in self._hooks:
                hook.remove()
            self._removed, self._calls.are_in_backward = True, False

    def _parts(self, optimizer: Optimizer, index: dict[int, int]) -> list[_Part]:
        """What an optimizer steps of each group."""
        plan = self._held.plan
        mine = sorted({index[id(p)] for p in params_of([optimizer]) if id(p) in index})
        parts: list[_Part] = []
        for g, group in enumerate(plan.groups):
            here = [i for i in mine if group.members.start <= i < group.members.stop]
            if here:
                members = [i - group.members.start for i in here]
                parts.append(_Part(g, here, *plan_of_members(plan, group, members)))
        return parts

    def _before(self, stepped: Sequence[int]) -> None:
        """Raises ValueError where the optimizer steps again before the step has ended."""
        again = next((i for i in stepped if i in self._stepped), None)
        if again is not None:
            raise checks.stepped_again(self._held.plan.params[again].name) from self._fault
        self._stepped.update(stepped)

    def _clip(self, part: _Part) -> bool:
        """Clips what a part steps; False where that fails, which `end_step` raises on all ranks."""
        try:
            self._clip_(part)
        except (TypeError, ValueError) as error:
            self._fault = self._fault or error
            return False
        return True

    def _clip_(self, part: _Part) -> None:
        held, plan = self._held, part.plan
        (group,) = plan.groups
        policy, state = held.policies[part.group], held.states[part.group]
        scale = at_least = None
        if group.scope is Scope.MODEL:
            policy, state = ClipNorm(float("inf"), group.norm_type), ()
            scale = self._coefficients[part.group]
        elif group.units is not None:
            num_units = len(self._buffers[part.group].per_tensor)
            state = _rows_of(state, part.rows, num_units)
            at_least = self._norms[part.group]
        if group.scope is Scope.UNIT:
            check_dense(plan.params)
        gradients = local_gradients([param.param for param in plan.params])
        if any_unreduced(gradients):
            raise checks.unreduced(plan)
        check_writable(gradients, plan.params)
        measured = measure(gradients, plan)
        self._buffers[part.group].put_measured(part.rows, measured[0])
        decision = clip_step.decide(
            gradients,
            plan,
            [policy],
            [state],
            call=f"{held.call}; in backward: {', '.join(plan.names)}",
            scale=scale,
            mode="propagate" if self._calls.mode == "propagate" else "zero",
            measured=measured,
            at_least=at_least,
        )
        valid = decision.clips[0].valid  # None for distclip's own policies
        if valid is not None and has_values(valid) and not bool(valid):
            raise checks.invalid_limit(plan)
        decision.apply_()

    def _applied(self, decision: Decision) -> Report:
        """The report of a step, with the coefficients that its hooks took."""
        figures = dict(decision.report.figures)
        for group, used in zip(self._held.plan.groups, self._coefficients, strict=True):
            if group.scope is Scope.MODEL:
                one = torch.ones((), dtype=torch.float64, device="cpu")
                figures[group.name] = figures[group.name]._replace(
                    coefficient=one if used is None else used
                )
        return replace(decision.report, figures=figures)


def _check(stepped: Sequence[Optimizer], calls: Calls) -> None:
    """Raises ValueError, LayoutError for what cannot be clipped in backward."""
    held = calls.held
    if calls.rounds.members():
        raise ValueError(
            "cannot attach in backward: the Clipper is attached to `optimizer.step()` already. "
            "End that with `attached.remove()`, or make a Clipper for each."
        )
    if held.backward is not None or calls.gradient is not None:
        raise ValueError(
            "cannot attach in backward with overlap=True or gradient=: hooks see `.grad`, "
            "which is measured and freed there. Leave both out."
        )
    if fault := held.follow([], scaled=False):
        raise fault
    if calls.tensor_norms and any(group.scope is Scope.UNIT for group in held.plan.groups):
        raise ValueError(
            "cannot attach in backward with tensor_norms= and limits per unit: the norms of "
            "tensors need a second look at gradients, which are freed by then. Leave one out."
        )
    checks.check_mode(calls.mode, held.plan, held.policies)
    checks.check_layouts(held.plan, held.declared)
    checks.check_optimizers(stepped, held.plan, held.modules)


class _Part(NamedTuple):
    """Parameters of one group that one optimizer steps; `indices` are those in the whole plan."""

    group: int
    indices: list[int]
    plan: Plan
    rows: Tensor

    def with_gradients(self) -> list[int]:
        each = zip(self.indices, self.plan.params, strict=True)
        return [i for i, param in each if param.param.grad is not None]


class _Hook:
    """Clips in every step of one optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        parts: Sequence[_Part],
        before: Callable[[Sequence[int]], None],
        clip: Callable[[_Part], bool],
    ) -> None:
        self._optimizer, self._parts = optimizer, parts
        self._begin, self._clip = before, clip
        self._hidden = HiddenGradients()
        self._clipped: list[tuple[int, int]] = []  # what runs now, as `_gradients` has it
        self._handles = [
            optimizer.register_step_pre_hook(cast(Any, self._before)),
            optimizer.register_step_post_hook(cast(Any, self._after)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @outside_of_graphs
    @torch.no_grad()
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self._gradients()
        if now and now == self._clipped:
            return  # torch calls the hooks again where a step calls `super().step()`
        self._hidden.forget()
        checks.check_call(self._optimizer, args, kwargs)
        parts = [part for part in self._parts if part.with_gradients()]
        self._begin([i for part in parts for i in part.with_gradients()])
        if not all([self._clip(part) for part in parts]):
            self._hidden.hide(params_of([self._optimizer]))
        self._clipped = self._gradients()

    @outside_of_graphs
    def _after(self, *_: Any) -> None:
        self._hidden.restore()
        self._clipped = []

    def _gradients(self) -> list[tuple[int, int]]:
        grads = [param.grad for param in params_of([self._optimizer])]
        return [(id(g), torch_private.version(g)) for g in grads if g is not None]


def _next(counts: Tensor, new: Tensor, old: Tensor | None, first: float) -> Tensor:
    """The new number where the step counts, which is not waited for; else the old one."""
    before = torch.full_like(new, first) if old is None else old.to(new.device)
    return torch.where(counts.to(new.device), new, before)


def _rows_of(state: Any, rows: Tensor, num_units: int) -> Any:
    """A policy's state for some of its units."""
    if not isinstance(state, Tensor):
        return type(state)(*(_rows_of(each, rows, num_units) for each in state))
    is_per_unit = state.ndim > 0 and len(state) == num_units
    return state.index_select(0, rows.to(state.device)) if is_per_unit else state
