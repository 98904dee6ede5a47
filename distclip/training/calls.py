"""The calls of a Clipper: what one has to know before and after `step.decide`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from distclip import nonfinite, parameters, step
from distclip.decision import Decision
from distclip.nonfinite import OnNonFinite, SkipCounter
from distclip.norms.measure import GroupMeasurement
from distclip.parameters import GradientFunction
from distclip.policies import Scope
from distclip.report import Report
from distclip.sharding.local_tensors import any_unreduced, local_gradients
from distclip.sharding.partial_gradients import reduce_gradients_
from distclip.torch_private import on_device
from distclip.training import backward_checks, folding, wrappers
from distclip.training.checked_optimizers import unheld_gradient
from distclip.training.held import Held, kept_between_calls
from distclip.training.rounds import Rounds
from distclip.training.step_hook import AttachedClipper


class Calls:
    """Decides in each call of a Clipper, and counts the calls.

    Args:
        gradient: where gradients are, if not in `.grad`.
        tensor_norms: every how many calls the norms of tensors are wanted; 0 for never.

    Attributes:
        rounds: of the optimizers that the Clipper is attached to.
        are_in_backward: hooks of backward clip and step, and nothing else may.
    """

    def __init__(
        self,
        held: Held,
        mode: OnNonFinite,
        skips: SkipCounter,
        gradient: GradientFunction | None,
        tensor_norms: int,
    ) -> None:
        self.held, self.skips = held, skips
        self.mode: OnNonFinite = mode
        self.gradient, self.tensor_norms = gradient, tensor_norms
        self._num_calls = 0
        self.rounds = Rounds(lambda: held.plan)
        self.are_in_backward = False

    @kept_between_calls
    def decide(
        self,
        stepped: list[Optimizer],
        scale: Tensor | None,
        on_apply: Callable[[Tensor], None] | None = None,
        at_step: int | None = None,
        loss: float | Tensor | None = None,
    ) -> Decision:
        """`step.decide` where it is known which factor the gradients still need; float64."""
        self.check_not_in_backward()
        held = self.held
        given = None if loss is None else parameters.as_loss(loss, held.plan.device)
        fault = held.follow(stepped, scaled=scale is not None)
        if given is not None and not held.plan.judges_loss:
            raise ValueError(
                "cannot judge a step by loss=: no policy of the Clipper may leave out steps. Leave "
                "it out, or use `distclip.SkipSpike()`, alone or as `SkipSpike() & ClipNorm(1.0)`."
            )
        try:
            gradients = self._gradients()
        except (TypeError, ValueError) as error:  # which other ranks may not have
            fault, gradients = fault or error, [None] * len(held.params)
        if fault is None and stepped and all(grad is None for grad in gradients):
            fault = unheld_gradient(stepped, held.plan.params)
        if fault is None and self.gradient is None and any(grad is None for grad in gradients):
            fault = backward_checks.never_clipped(held.params, held.plan.names)
        measured = None
        if held.backward is not None and not any_unreduced(gradients):
            measured = held.backward.measurements(gradients, self._wants_tensors())
        decision = self._decide(gradients, fault, measured, scale, on_apply, at_step, given)
        self._raise_if_nonfinite(decision)
        return self._count(decision)

    @kept_between_calls
    def end_step(
        self, measured: Sequence[GroupMeasurement], fault: Exception | None, at_step: int | None
    ) -> Decision:
        """`decide` where hooks have measured, clipped and stepped the gradients."""
        nothing = [None] * len(self.held.params)
        decision = self._decide(nothing, fault, measured, None, None, at_step)
        self._raise_if_nonfinite(decision, measured)
        return self._count(decision)

    def step_closure(
        self,
        stepped: Sequence[Optimizer],
        scaler: GradScaler | None,
        scale: float | Tensor | None,
        closure: Callable[[], Any],
        at_step: int | None,
    ) -> Report:
        """`optimizer.step(closure)`, with the gradients of each evaluation clipped."""
        (optimizer,) = stepped
        if scaler is not None and scaler.is_enabled():
            scaler.step(optimizer, closure=closure)  # raises: torch has no closures under a scaler
        plan = self.held.plan
        factor = None if scale is None else parameters.as_scalar(scale, plan.device)

        def decide_scaled(stepped: list[Optimizer], *_: Any) -> Decision:
            return self.decide(stepped, factor, at_step=at_step)

        attached = AttachedClipper([optimizer], None, decide_scaled, Rounds(lambda: plan))
        try:
            optimizer.step(closure)
        finally:
            attached.remove()
        assert attached.report is not None
        return attached.report

    def note_steps(self, stepped: Sequence[Optimizer]) -> None:
        """For `print(clipper.plan)`."""
        calls = self.held.plan.calls
        if not (isinstance(calls.steps, folding.Steps) and calls.steps.is_of(stepped)):
            calls.steps = folding.Steps(stepped, self.gradient is None, self.mode)

    def check_not_in_backward(self) -> None:
        """Raises ValueError where hooks of backward clip."""
        if self.are_in_backward:
            raise ValueError(
                "cannot clip: the Clipper is attached in backward, where hooks have clipped and "
                "stepped the gradients. Call `attached.end_step()` in each step, or end it with "
                "`attached.remove()` first."
            )

    def check_steps(self, stepped: Sequence[Optimizer]) -> None:
        """Raises ValueError for optimizers whose steps clip already, or do not step."""
        attached = [each.optimizer for each in self.rounds.members()]
        for each in stepped:
            if any(inner is other for inner in wrappers.unwrapped([each]) for other in attached):
                raise ValueError(
                    f"cannot clip and step this {type(each).__qualname__}: the Clipper is attached "
                    f"to it, and would clip twice and count the step twice. Call "
                    f"`optimizer.step()`, or end it with `attached.remove()` first."
                )
            wrappers.check_accumulated(each)
            self.check_wrapped(each)

    def check_wrapped(self, optimizer: Optimizer) -> None:
        """Raises ValueError for a wrapper that steps other tensors than those of the plan."""
        if self.gradient is None:
            wrappers.check_wrapped(optimizer, self.held.plan)

    def _gradients(self) -> list[Tensor | None]:
        held = self.held
        if self.gradient is not None:
            return parameters.gradients_from(self.gradient, held.plan.params)
        if held.backward is not None:
            gradients = held.backward.gradients()
        else:
            gradients = local_gradients(held.params)
        for group in held.plan.groups:
            if group.scope is Scope.UNIT:
                parameters.check_dense(held.plan.params[group.members])
        return gradients

    def _wants_tensors(self) -> bool:
        return self.tensor_norms > 0 and self._num_calls % self.tensor_norms == 0

    def _decide(
        self,
        gradients: Sequence[Tensor | None],
        fault: Exception | None,
        measured: Sequence[GroupMeasurement] | None,
        scale: Tensor | None,
        on_apply: Callable[[Tensor], None] | None,
        at_step: int | None,
        loss: Tensor | None = None,
    ) -> Decision:
        held, wants_tensors = self.held, self._wants_tensors()
        self._num_calls += 1
        call = held.call if at_step is None else f"{held.call}; step={at_step}"
        decision = step.decide(
            gradients,
            held.plan,
            held.policies,
            held.states,
            scale=None if scale is None else on_device(scale, held.plan.device),
            mode=self.mode,
            call=f"{call}; with tensor norms" if wants_tensors else call,
            reduce=partial(reduce_gradients_, held.params),
            fault=fault,
            measured=measured,
            in_grad=self.gradient is None,
            on_apply=on_apply,
            invalid=held.limit_checks.invalid,
            tensor_norms=wants_tensors,
            loss=loss,
        )
        valid = [clip.valid for clip in decision.clips]
        held.limit_checks.check(valid, lambda: decision.finite)
        return decision

    def _raise_if_nonfinite(
        self, decision: Decision, measured: Sequence[GroupMeasurement] | None = None
    ) -> None:
        counted = None
        if self.mode in ("skip", "zero"):
            counted = decision.accepted
        elif decision.vetoed is not None:
            counted = ~decision.vetoed
        too_many = counted is not None and self.skips.count_(counted)
        if too_many or (self.mode == "raise" and decision.is_known_nonfinite):
            decision.take_effect()  # a scaler can skip the step of who goes on
            in_a_row, vetoes = self.skips.max_consecutive, decision.vetoed is not None
            if too_many and vetoes and not decision.is_known_nonfinite:
                raise nonfinite.too_many_vetoes(decision.total_norm, in_a_row)
            raise nonfinite.error(
                decision.total_norm,
                decision.gradients,
                self.held.plan,
                in_a_row if too_many else None,
                vetoes,
                measured=measured,
            )

    def _count(self, decision: Decision) -> Decision:
        self.held.states = decision.next_policy_states(self.held.states)
        return decision
