"""What a Clipper holds: the plan for its parameters as they are now, and its policies' states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import param_groups
from distclip.limits import LimitChecks
from distclip.norms.agreement import policy_text
from distclip.norms.plan import Plan
from distclip.norms.reduce import check_same_call
from distclip.param_groups import GroupSource, NamedParameters
from distclip.policies import Scope, state_dict
from distclip.training.backward import BackwardNorms
from distclip.training.checked_optimizers import CheckedOptimizers
from distclip.training.model_changes import ModelChanges, check_present

F = TypeVar("F", bound=Callable[..., Any])


def kept_between_calls(function: F) -> F:
    """`function`, outside of inference mode and of autograd.

    What is made in inference mode cannot be written outside of it: policies' states, counters,
    buffers of a plan. `inference_mode(False)` alone would record operations for autograd.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


class Held:
    """The parameters of a Clipper, also where the model or an optimizer gets others.

    Args:
        sources: the parameter groups as the user gives them.
        modules: what parameters without a name are from.
        plan_for: makes a plan.
        with_tensors: adds `Plan.tensor_groups`; None where no step wants the norm of every tensor.
        declared: there is a `LayoutFunction`; the ranks may hold different parameters then.
        overlap: measure in backward.

    Attributes:
        declared: as given.
        params: in the order of `plan.params`.
        policies, states: of each group of the plan.
        call: what must be the same on all ranks, as text.
        backward: what backward has measured, with `overlap`.

    Collective: those of `Clipper` at construction; for another plan during training those of
        `read_layouts`, and the all-gathers where ranks hold units or tensors of their own.
    """

    plan: Plan
    params: list[Tensor]
    states: list[Any]
    call: str
    limit_checks: LimitChecks
    backward: BackwardNorms | None

    def __init__(
        self,
        sources: Sequence[GroupSource],
        modules: Sequence[nn.Module],
        plan_for: Callable[[NamedParameters], Plan],
        with_tensors: Callable[[Plan], Plan] | None,
        *,
        declared: bool,
        overlap: bool,
    ) -> None:
        self._sources, self._modules = sources, modules
        self._plan_for, self._with_tensors = plan_for, with_tensors
        self.declared, self._overlap = declared, overlap
        self.policies = [source.policy for source in sources]
        self._checked = CheckedOptimizers()
        self._hold(self._read_sources(), is_first=True)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Those that the parameters were taken from."""
        return self._read.modules

    def changed(self) -> bool:
        """Whether the modules have other parameters than those of the plan."""
        return self._changes.any()

    def follow(self, stepped: Sequence[Optimizer], scaled: bool) -> Exception | None:
        """Brings the plan up to date with the modules and the optimizers; an error if it cannot.

        Args:
            scaled: see `CheckedOptimizers.new_params`.
        """
        try:
            if self.changed():
                self._hold_again(self._read_sources())
            if stepped:
                added = self.new_params(stepped, scaled)
                if added:
                    self._sources = param_groups.with_params(self._sources, added)
                    self._hold_again(self._read_sources())
        except ValueError as error:
            return error
        return None

    def new_params(self, stepped: Sequence[Optimizer], scaled: bool) -> list[Tensor]:
        """See `CheckedOptimizers.new_params`."""
        return self._checked.new_params(stepped, self.plan.params, scaled)

    def group_states(self) -> list[state_dict.GroupState]:
        """The states with their names.

        Raises:
            ValueError: a policy remembers numbers of units, which have no names, and ranks hold
                different ones.
        """
        self._check_units("save", is_local=self.plan.reduce_mesh is not None)
        return self._with_names(self.states)

    def initial_group_states(self) -> list[state_dict.GroupState]:
        """Those before the first step. Raises: as `group_states`."""
        self._check_units("load", is_local=self.plan.reduce_mesh is not None)
        return self._with_names(self._initial_states())

    def _read_sources(self) -> NamedParameters:
        return param_groups.read_sources(self._sources, self._modules)

    def _hold(self, read: NamedParameters, is_first: bool = False) -> None:
        """Makes the plan for these parameters, and the policies' states before the first step."""
        plan = self._plan_for(read)
        policies = zip(plan.groups, self.policies, strict=True)
        texts = [f"{group.name}: {policy_text(policy)}" for group, policy in policies]
        listed = "" if self.declared else plan.parameters_text
        self.call = "; ".join(filter(None, [plan.rule, *texts, listed]))
        if is_first:
            plan.connect()
        if self._with_tensors is not None:
            if is_first:
                check_same_call(plan, self.call)
            plan = self._with_tensors(plan)
        if not is_first:
            plan.calls.steps, plan.calls.number = self.plan.calls.steps, self.plan.calls.number
        self.plan = plan
        self._read, self._changes = read, ModelChanges(read)
        self.params = [param.param for param in plan.params]
        self.states = self._initial_states()
        self.limit_checks = LimitChecks(plan, self.policies)
        self._checked.look_again()
        self.backward = BackwardNorms(plan, read.modules) if self._overlap else None

    def _hold_again(self, read: NamedParameters) -> None:
        """`_hold`, where the model or the optimizer has got other parameters during training."""
        before = self._read.named
        # DDP over tensor parallelism hides parameters in its first forward, FSDP2 shows others.
        same = {id(tensor) for _, tensor in before} == {id(tensor) for _, tensor in read.named}
        if same and not self._changes.needs_new_plan():
            self._changes = ModelChanges(read)
            return
        check_present(read, before)
        self._check_units("carry over", is_local=True)
        states = self._with_names(self.states)
        self.backward = None  # its hooks go before others come
        self._hold(read)
        self.states = state_dict.carried_over(states, self._with_names(self.states))

    def _initial_states(self) -> list[Any]:
        return [
            policy.init(1 if group.units is None else group.units.num_units, self.plan.device)
            for group, policy in zip(self.plan.groups, self.policies, strict=True)
        ]

    def _check_units(self, doing: str, is_local: bool) -> None:
        """Args: is_local: other ranks, or the model as it is now, have other units."""
        for group, policy, state in zip(self.plan.groups, self.policies, self.states, strict=True):
            if is_local and group.scope is Scope.UNIT and state_dict.has_vectors(state):
                raise ValueError(
                    f"cannot {doing} what {type(policy).__name__} remembers of group "
                    f"{group.name!r}: it has a number for each unit, and units have no names by "
                    f"which other ranks, or a changed model, would know them. Let the policy "
                    f"remember numbers of tensors (Scope.TENSOR) or of the model."
                )

    def _with_names(self, states: Sequence[Any]) -> list[state_dict.GroupState]:
        return [
            state_dict.GroupState(
                group.name,
                type(policy).__name__,
                group.units.row_names if group.units and group.scope is Scope.TENSOR else None,
                state,
                policy,
            )
            for group, policy, state in zip(self.plan.groups, self.policies, states, strict=True)
        ]
