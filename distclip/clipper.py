"""The object that users hold, and what stands behind torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distclip import nonfinite
from distclip import parameters as inputs
from distclip.norms import measure
from distclip.norms.plan import make_plan
from distclip.parameters import Parameters, ParamGroups
from distclip.policies import ClipNorm, Policy, Scope
from distclip.policies import state_dict as state
from distclip.report import Report
from distclip.sharding.layout import Layouts, read_layouts
from distclip.sharding.local_tensors import local_gradients
from distclip.step import Decision, decide, kept, report_of, write_
from distclip.training import fused, optimizers
from distclip.training import grad_scaler as amp
from distclip.training.backward import BackwardNorms
from distclip.training.optimizers import Optimizers
from distclip.training.step_hook import StepHook


class Clipper:
    """Clips the gradients of a model, however it is sharded.

    Args:
        parameters: an `nn.Module` (needed for FSDP1; parameters keep their names), an iterable of parameters, or
            parameter groups `{"params", "policy", "name"}`, whose "params" are either. Make the clipper after the
            model has been wrapped and sharded.
        policy: how large the gradients may be; of groups, those that name none.
        mesh: a `DeviceMesh` over all ranks that train together. Found from the parameters' DTensors when omitted.
        distinct: the mesh axes whose ranks hold different parameters.
        layouts: for sharding that tensors do not show: `(name, parameter) -> Layout`, or None to read the tensor.
        on_nonfinite: when the total norm is NaN or infinite: "propagate" scales by limit / norm, as torch does;
            "raise" raises on every rank and leaves the gradients as they are; "skip" leaves them as they are, and
            `step` leaves the optimizer's step out; "zero" makes them zero.
        max_consecutive_skips: with "skip" and "zero", how many steps in a row may be so before a call raises.
        overlap: measure each gradient during backward, as soon as it is final: under FSDP2 after its reduce-scatter,
            under DDP after its bucket's all-reduce (the clipper needs the module, and takes DDP's one communication
            hook), of plain parameters at once. A gradient that has changed since, and any other, is measured when
            the clipper is called; a write through `.data` alone cannot be seen.

    Raises:
        LayoutError: it cannot be told which ranks hold which elements.
        ValueError, TypeError: something that cannot be clipped.

    Collective: at construction, the making of a process group where a mesh of several axes leaves out ranks of
        the world, and an all-gather of a few numbers where pipeline stages have norms by tensor or unit. All ranks of
        the mesh must make the clipper, and call it every step.
    """

    def __init__(
        self,
        parameters: Parameters | ParamGroups,
        policy: Policy[Any] = ClipNorm(1.0),  # noqa: B008 - frozen
        *,
        mesh: DeviceMesh | None = None,
        distinct: Sequence[str] = ("pp",),
        layouts: Layouts | None = None,
        on_nonfinite: str = "propagate",
        max_consecutive_skips: int = 20,
        overlap: bool = False,
    ) -> None:
        nonfinite.check_rule(on_nonfinite, max_consecutive_skips)
        self.policy = policy
        self._on_nonfinite = on_nonfinite
        self._skips = nonfinite.SkipCounter(max_consecutive_skips)
        self._agreed: set[tuple[Optimizer, ...]] = set()
        given = inputs.read(parameters, policy)
        self._modules = given.modules
        held, team = read_layouts(given.named, given.modules, mesh, tuple(distinct), layouts)
        self.plan = make_plan(held, team, given.groups)
        self._params = [h.param for h in held]
        self._states: list[Any] = []
        for group in self.plan.groups:
            num = 1 if group.units is None else group.units.num
            self._states.append(group.policy.init(num, self.plan.device))
        self._early = BackwardNorms(self.plan, self._modules) if overlap else None

    @property
    def skipped(self) -> Tensor:
        """How many calls so far found a norm that was not finite, with "skip" or "zero"; int64, on the device."""
        return self._skips.total.clone()

    @torch.no_grad()
    def clip_(self, optimizer: Optimizers | None = None, scaler: GradScaler | None = None) -> Report:
        """Scales the gradients in place: call it after backward, on every rank, before `optimizer.step()`.

        With a scaler the gradients are unscaled as well, in the same pass; `scaler.step(optimizer)` and
        `scaler.update()` follow as always. An overflow on any rank makes all of them skip. Give all optimizers that
        step what the clipper holds: `clip_([first, second], scaler=scaler)`. Where `scaler.unscale_` was called
        before, nothing is unscaled again. Without a scaler the optimizer has no meaning.

        Raises:
            NonFiniteGradientError: with on_nonfinite="raise", on every rank together.
            ValueError: the optimizers do not step the parameters that the clipper holds.
            RuntimeError, AssertionError: torch's own, where `scaler.unscale_(optimizer)` would raise them.

        Collective: one all-reduce of a few numbers; none where nothing is sharded. The first time with a scaler and
            these optimizers, an all-gather of a short text as well.
        """
        decision = self.decide(optimizers.listed(optimizer), scaler)
        write_(decision)
        return report_of(decision)

    def step(
        self, optimizer: Optimizers, scaler: GradScaler | None = None, closure: Callable[[], Any] | None = None
    ) -> Report:
        """`clip_` and `optimizer.step()`, or `scaler.step(optimizer)`; `scaler.update()` remains yours.

        Optimizers with `fused=True` get the coefficient and the loss scale as one number (`grad_scale`), and their
        kernels write the gradients; others step after `clip_`. The result is the same up to rounding, except that a
        coefficient below 1e-38 folds into zero. Not folded: subclasses, groups that are not all fused, optimizers
        that do not step what the clipper holds, on_nonfinite="zero". Where the norm is not finite, a scaler skips the
        step, and so does on_nonfinite="skip": on the device if folded, else on the host, which waits for the norm.

        Args:
            closure: as `optimizer.step` has it. The gradients of each evaluation are clipped.

        Raises, Collective: as `clip_`.
        """
        stepped = optimizers.listed(optimizer)
        if closure is not None:
            return self._step_closure(stepped, scaler, closure)
        with torch.no_grad():
            decision = self.decide(stepped, scaler)
            found_inf = self.found_inf(decision, amp.is_on(scaler))
            if not (folds := self.folds(stepped)):
                write_(decision)
        for each in stepped:
            if folds:
                with fused.folded(each, decision.factor, found_inf):
                    optimizers.step(each, scaler)
            elif found_inf is None or amp.is_on(scaler) or not bool(found_inf):
                optimizers.step(each, scaler)
        return report_of(decision)

    def attach(self, optimizer: Optimizer, scaler: GradScaler | None = None) -> StepHook:
        """Clips whenever `optimizer.step()` runs, for loops that are not yours; `.remove()` ends it.

        A pre-hook does what `step` does, also under `GradScaler.step` with fused optimizers: the gradients are then
        still scaled. Give the scaler as well where overflow on one rank may be unseen on others (several meshes,
        pipelines, plain experts): all ranks then skip and halve the scale. With optimizers that are not fused a
        scaler decides before the hook runs, so that ranks of which some skip would wait for each other: use `step`.

        `.report` of what is returned is that of the latest step. The attributes that fold the coefficient are gone
        after the step; after one that raises, with the next step or `.remove()`.

        Collective: each step, as `clip_`; all ranks must step.
        """
        return StepHook(self, optimizer, scaler)

    def decide(
        self,
        stepped: Sequence[Optimizer],
        scaler: GradScaler | None,
        inverse_scale: Tensor | None = None,
        values: Sequence[Tensor | None] | None = None,
    ) -> Decision:
        """Measures, decides, tells the scaler; raises on all ranks together. Changes no gradient.

        Args:
            values: of the gradients, in the order of `plan.params`, where they do not lie in `.grad`.
        """
        inverse_scale = amp.inverse_scale(scaler, stepped) if inverse_scale is None else inverse_scale
        if stepped and inverse_scale is not None and tuple(stepped) not in self._agreed:
            optimizers.check_same_parameters(stepped, self.plan)
            self._agreed.add(tuple(stepped))
        early = self._early if values is None else None
        values = self._values() if values is None else values
        local = early.local(values) if early is not None else measure.local(values, self.plan)
        decision = decide(values, local, self.plan, self._states, inverse_scale, self._on_nonfinite)
        amp.record(scaler, stepped, decision.finite)
        too_many = self._on_nonfinite in ("skip", "zero") and self._skips.count_(decision.finite)
        if too_many or (self._on_nonfinite == "raise" and not bool(decision.finite)):
            in_a_row = self._skips.most_in_a_row if too_many else None
            raise nonfinite.error(decision.norm, decision.values, self.plan, in_a_row)
        self._states = kept(decision, self._states)
        return decision

    def folds(self, stepped: Sequence[Optimizer]) -> bool:
        """Whether the optimizers can do the multiplication. May differ between ranks: the result does not."""
        one_factor = (
            len(self.plan.groups) == 1
            and self.plan.groups[0].policy.scope is Scope.MODEL
            and self._on_nonfinite != "zero"
        )
        return one_factor and optimizers.fold(stepped, self.plan)

    def found_inf(self, decision: Decision, scaled: bool) -> Tensor | None:
        """1 where the step is to be skipped; None where it never is."""
        return fused.found_inf(decision.finite) if scaled or self._on_nonfinite == "skip" else None

    def _step_closure(
        self, stepped: Sequence[Optimizer], scaler: GradScaler | None, closure: Callable[[], Any]
    ) -> Report:
        (optimizer,) = stepped
        if scaler is not None and scaler.is_enabled():
            scaler.step(optimizer, closure=closure)  # raises: torch has no closures under a scaler
        attached = self.attach(optimizer)
        try:
            optimizer.step(closure)
        finally:
            attached.remove()
        assert attached.report is not None
        return attached.report

    def _values(self) -> list[Tensor | None]:
        values = local_gradients(self._params) if self._early is None else self._early.values()
        if all(v is None for v in values):
            for module in self._modules:
                inputs.check_fresh(module, self._params)
        for group in self.plan.groups:
            if group.policy.scope is Scope.UNIT:
                inputs.check_dense([(h.name, h.param) for h in self.plan.params[group.members]])
        return values

    def state_dict(self) -> dict[str, Any]:
        """What the policies remember: tensors and numbers, by the names of groups, policies and parameters.

        The same on every rank (of a pipeline stage), however many ranks there are and however they share the model.
        """
        return state.to_dict(self._group_states())

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, on any number of ranks.

        Raises:
            ValueError: a state of another version, another policy or other parameters; nothing is loaded.
        """
        self._states = state.from_dict(self._group_states(), saved)

    def _group_states(self) -> list[state.GroupState]:
        return [
            state.GroupState(
                g.name,
                type(g.policy).__name__,
                g.units.row_names if g.units is not None and g.policy.scope is Scope.TENSOR else None,
                s,
            )
            for g, s in zip(self.plan.groups, self._states, strict=True)
        ]
