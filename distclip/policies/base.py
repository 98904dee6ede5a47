"""What a policy is: how large a group of elements is, and the limit for its norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distclip.arguments import kind_of, shown
from distclip.policies.checks import check_norm_type

# A NamedTuple of tensors, or of such NamedTuples.
State = TypeVar("State", bound="tuple[Any, ...]")


class Scope(Enum):
    """The elements that share one norm and one limit."""

    MODEL = "model"
    TENSOR = "tensor"
    UNIT = "unit"  # one index of a dim, such as an output channel; a tensor of at most one dim
    ELEMENT = "element"


class NormContext(NamedTuple):
    """What a policy knows about its groups of elements beside their norms; equal on every rank.

    The tensors may be those of later steps too: do not write to them.

    Attributes:
        sizes: the number of elements of each group over all ranks; float64, shaped like the norms.
            That of the whole model is NaN where ranks may hold different parameters, along a
            distinct axis or by `layouts=`: only a collective could tell it.
        weights: the norm of each group's parameters; float64, shaped like the norms. None unless
            the policy sets `needs_weights`. 0 for what is frozen and has no gradient, whose limit
            is not used.
        total_norm: the norm of everything that the policy limits; a float64 scalar.
        loss: the mean of the ranks' losses, for policies with `accept`: NaN where no rank gave one,
            infinity where one is not finite; a float64 scalar. None counts as NaN.
    """

    sizes: Tensor
    weights: Tensor | None
    total_norm: Tensor
    loss: Tensor | None = None


class Policy(Protocol[State]):
    """A frozen dataclass that sets limits. It sees no ranks, no layouts and no devices.

    Derive from `PolicyBase`, or from `StatelessPolicy` if there is no state: they give `a & b`
    and the members that few policies change.

    A policy with Scope.MODEL may have one method more, `accept(norms, state, context) -> Tensor`:
    a bool scalar on the device of the norms, false where the step is to be left out on all ranks
    although the norm is finite. It gets what `limit` gets and never waits for the device. The
    caller keeps the old state of every policy where a step is left out.

    A policy may say `raises = True`: its limit is then the norm that each group gets, also where
    that is more than the group has. The coefficient is limit / norm, and 1 where the norm is 0 or
    the limit infinite. It is at most 2**100, for which float32 has room. An element that becomes
    too large for its dtype, because the limit is, becomes infinite.
    """

    @property
    def scope(self) -> Scope: ...

    @property
    def norm_type(self) -> float: ...

    @property
    def unit_dim(self) -> int:
        """The dim whose indices are the units of Scope.UNIT: 0 or -1."""
        ...

    @property
    def exclude(self) -> tuple[str | nn.Module, ...]:
        """The parameters that are never clipped: names, patterns of names, or modules."""
        ...

    @property
    def needs_weights(self) -> bool:
        """Whether `NormContext.weights` must be measured."""
        ...

    def init(self, num_groups: int, device: torch.device) -> State:
        """The state before the first step, on `device`; equal on every rank."""
        ...

    def limit(
        self, norms: Tensor, state: State, context: NormContext
    ) -> tuple[Tensor | None, State]:
        """The largest norms allowed, and the state after this step. Never waits for the device.

        A limit of None means: measure only, write nothing. One that is negative or NaN for a finite
        norm is an error, and nothing is scaled by it. The caller keeps the new state where
        the total norm is finite and no policy vetoes the step, else the old state.

        Shapes: norms and limits: [] with Scope.MODEL and Scope.ELEMENT, else [num_groups]; float64,
            on the device of the norms. A scalar limit may lie on the CPU.
        """
        ...


class PolicyBase:
    """The base of a policy: `a & b`, and defaults for the members that few policies change.

    Example: the limit falls by half every step.
        >>> from dataclasses import dataclass
        >>> from typing import NamedTuple
        >>> import torch, distclip
        >>> class HalvingState(NamedTuple):
        ...     limit: torch.Tensor
        >>> @dataclass(frozen=True)
        ... class Halving(distclip.PolicyBase):
        ...     max_norm: float
        ...     scope = distclip.Scope.MODEL
        ...     norm_type = 2.0
        ...
        ...     def init(self, num_groups, device):
        ...         limit = torch.full((), self.max_norm, dtype=torch.float64, device=device)
        ...         return HalvingState(limit)
        ...
        ...     def limit(self, norms, state, context):
        ...         return state.limit, HalvingState(state.limit / 2)
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> clipper = distclip.Clipper([weight], Halving(8.0) & distclip.ClipNorm(3.0))
        >>> weight.grad = torch.full((3,), 100.0)
        >>> [clipper.clip_().limit.item() for step in range(3)]
        [3.0, 3.0, 2.0]
    """

    unit_dim = 0
    exclude = ()
    needs_weights = False
    raises = False  # norms that are below their limits
    sets_limits = True  # else `limit` returns None in every step

    def valid_state(self, state: Any) -> Any:
        """Which numbers of a loaded state can be some: bools in the form of `state`, or None.

        None, the default, allows every finite number, and NaN and infinity in the fields where
        `init` has some. These need not be excluded here.
        """
        return None

    def __and__(self: Policy[Any], other: Policy[Any]) -> Minimum:
        return Minimum(self, other)


def valid_state(policy: Any, state: Any) -> Any:
    """`policy.valid_state(state)`; None where the policy has no such method."""
    return policy.valid_state(state) if hasattr(policy, "valid_state") else None


def vetoes(policy: Any) -> bool:
    """Whether it may leave out a step: it has `accept`."""
    if isinstance(policy, Minimum):
        return vetoes(policy.first) or vetoes(policy.second)
    return hasattr(policy, "accept")


def raises(policy: Any) -> bool:
    """Whether norms below its limits become larger: the policy says `raises = True`."""
    return bool(getattr(policy, "raises", False))


def _sets_limits(policy: Any) -> bool:
    return bool(getattr(policy, "sets_limits", True))


def accept(policy: Any, norms: Tensor, state: Any, context: NormContext) -> Tensor | None:
    """`policy.accept(norms, state, context)`; None where the policy never vetoes.

    Raises:
        TypeError: it returned no bool scalar.
    """
    if not vetoes(policy):
        return None
    accepted = policy.accept(norms, state, context)
    if isinstance(accepted, Tensor) and accepted.dtype is torch.bool and not accepted.ndim:
        return accepted.to(norms.device)
    raise TypeError(
        f"cannot clip with the policy {shown(policy)}: its `accept` returned {shown(accepted)}, "
        f"{kind_of(accepted)}, and it is unclear whether the step is to be left out. Return a bool "
        f"tensor without dims, such as `norms <= threshold`."
    )


def never_negative(policy: Any) -> bool:
    """Whether limits for finite norms are known to be 0 or above, as tests show for distclip's.

    Those that follow from weights may be NaN where the weights are.
    """
    if isinstance(policy, Minimum):
        return never_negative(policy.first) and never_negative(policy.second)
    return type(policy).__module__.startswith("distclip.") and not policy.needs_weights


def constant_limit(limit: float, norms: Tensor) -> Tensor | None:
    """`limit` for one norm, on the CPU, which costs an accelerator nothing; None for infinity."""
    if math.isinf(limit):
        return None
    return torch.full(norms.shape, limit, dtype=torch.float64, device="cpu")


class EmptyState(NamedTuple):
    """The state of a policy that keeps none."""


class StatelessPolicy(PolicyBase):
    """The base of a policy whose limits do not depend on past steps."""

    def init(self, num_groups: int, device: torch.device) -> EmptyState:
        return EmptyState()


class MinimumState(NamedTuple):
    first: tuple[Any, ...]
    second: tuple[Any, ...]


@dataclass(frozen=True)
class Minimum(PolicyBase):
    """The smaller of the limits that `first` and `second` set for the same norms: `first & second`.

    Each keeps its own statistics, of the norms before either has clipped. A step that one of them
    vetoes is left out.

    Raises:
        TypeError: one of them is no policy.
        ValueError: their norms are not the same ones, because the `scope`, `norm_type`, `unit_dim`
            or `exclude` differ; or they clamp elements, which takes no limit for a norm; or one
            raises norms, unless the other is one that sets no limits, such as `SkipSpike`.

    Example:
        >>> import distclip
        >>> distclip.ClipBlockRMS(0.1) & distclip.AdaGC(warmup_steps=5)  # doctest: +ELLIPSIS
        Minimum(first=ClipBlockRMS(threshold=0.1), second=AdaGC(ratio=1.04, ...warmup_steps=5))
    """

    first: Policy[Any]
    second: Policy[Any]

    def __post_init__(self) -> None:
        for policy in (self.first, self.second):
            check_policy(policy)
        for member in ("scope", "norm_type", "unit_dim", "exclude"):
            a, b = getattr(self.first, member), getattr(self.second, member)
            if a != b:
                raise ValueError(
                    f"cannot take the smaller limit of {self.first} and {self.second}: their "
                    f"{member} is {a} and {b}, and limits for different norms cannot be compared. "
                    f"Combine policies with the same {member}, or give each its own parameter "
                    f"group."
                )
        if self.scope is Scope.ELEMENT:
            raise ValueError(
                f"cannot take the smaller limit of {self.first} and {self.second}: they clamp each "
                f"element, which needs no norm and no limit for one. Write one policy with the "
                f"smaller clip_value."
            )
        if self.raises and _sets_limits(self.first) and _sets_limits(self.second):
            raising = self.first if raises(self.first) else self.second
            raise ValueError(
                f"cannot take the smaller limit of {self.first} and {self.second}: {raising} says "
                f"which norm gradients get, and raises them to it, while a limit leaves smaller "
                f"norms as they are. The smaller of the two is neither. Use one of them, or give "
                f"each its own parameter group."
            )

    @property
    def scope(self) -> Scope:
        return self.first.scope

    @property
    def norm_type(self) -> float:
        return self.first.norm_type

    @property
    def unit_dim(self) -> int:
        return self.first.unit_dim

    @property
    def exclude(self) -> tuple[str | nn.Module, ...]:
        return self.first.exclude

    @property
    def needs_weights(self) -> bool:
        return self.first.needs_weights or self.second.needs_weights

    @property
    def raises(self) -> bool:
        return raises(self.first) or raises(self.second)

    @property
    def sets_limits(self) -> bool:
        return _sets_limits(self.first) or _sets_limits(self.second)

    def init(self, num_groups: int, device: torch.device) -> MinimumState:
        first = self.first.init(num_groups, device)
        return MinimumState(first, self.second.init(num_groups, device))

    def valid_state(self, state: MinimumState) -> MinimumState:
        first = valid_state(self.first, state.first)
        return MinimumState(first, valid_state(self.second, state.second))

    def limit(
        self, norms: Tensor, state: MinimumState, context: NormContext
    ) -> tuple[Tensor | None, MinimumState]:
        a, first = self.first.limit(norms, state.first, context)
        b, second = self.second.limit(norms, state.second, context)
        smaller = b if a is None else a if b is None else torch.minimum(a, b)
        return smaller, MinimumState(first, second)

    def accept(self, norms: Tensor, state: MinimumState, context: NormContext) -> Tensor:
        first = accept(self.first, norms, state.first, context)
        second = accept(self.second, norms, state.second, context)
        each = [one for one in (first, second) if one is not None]
        return each[0] if len(each) == 1 else each[0] & each[1]


_MEMBERS = ("scope", "norm_type", "unit_dim", "exclude", "needs_weights", "init", "limit")


def check_policy(policy: Any, group: str | None = None) -> None:
    """Raises TypeError unless `policy` is an instance with every member of `Policy`.

    Args:
        group: the name of the parameter group that has it, for the error.
    """
    missing = [name for name in _MEMBERS if not hasattr(policy, name)]
    if isinstance(policy, type):
        found = "it is a class and not an instance of one"
    elif missing:
        found = f"it has no `{missing[0]}`, which every policy has"
    elif not isinstance(policy.scope, Scope):
        found = f"its scope is {policy.scope!r}, which is no member of distclip.Scope"
    elif vetoes(policy) and policy.scope is not Scope.MODEL:
        found = (
            f"it has `accept` and {policy.scope}, but a step is left out on all ranks or on none, "
            f"and only the norm of Scope.MODEL is the same on each"
        )
    elif raises(policy) and policy.scope is Scope.ELEMENT:
        found = "it raises norms and has Scope.ELEMENT, whose elements are clamped and not scaled"
    else:
        check_norm_type("norm_type", policy.norm_type)
        return
    of_group = "" if group is None else f" of group {group!r}"
    raise TypeError(
        f"cannot clip with the policy {shown(policy)}{of_group}: {found}. Pass an instance "
        f"of a policy, such as distclip.ClipNorm(1.0); to write a policy, derive from "
        f"distclip.PolicyBase."
    )


class GroupSpec(NamedTuple):
    """A parameter group as the user gives it: `params[members]` follow `policy`."""

    name: str
    members: slice
    policy: Policy[Any]
