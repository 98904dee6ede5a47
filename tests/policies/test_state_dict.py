"""The saved form of policy states: what is under which key, and what does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distclip import Clipper
from distclip.policies import (
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipNorm,
    Minimum,
    Policy,
    PolicyBase,
    Scope,
    SkipSpike,
    ZClip,
)
from distclip.policies.adagc import AdaGCState
from distclip.policies.state_dict import GroupState, from_dict, to_dict
from tests.policies.steps import POLICIES, context, norms_shape, spiky_norms


def group(policy: Policy[Any], name: str = "all", tensors: tuple[str, ...] = ()) -> GroupState:
    state = policy.init(max(1, len(tensors)), torch.device("cpu"))
    tensor_names = list(tensors) if tensors else None
    return GroupState(name, type(policy).__name__, tensor_names, state, policy)


def plain(saved: Any) -> Any:
    if isinstance(saved, Tensor):
        return saved.tolist()
    return {key: plain(v) for key, v in saved.items()} if isinstance(saved, dict) else saved


def test_the_keys_are_those_of_version_1() -> None:
    adagc = AdaGCState(torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor(7))
    groups = [
        GroupState("body", "AdaGC", ["w", "b"], adagc),
        group(ClipNorm(1.0) & ZClip(), "head"),
        group(AutoClip(history=1), "tail"),
    ]
    zclip = {"mean": 0.0, "var": 0.0, "num_steps": 0}
    assert plain(to_dict(groups)) == {
        "version": 1,
        "groups": {
            "body": {"AdaGC": {"gamma": {"w": 0.5, "b": 2.0}, "num_steps": 7}},
            "head": {"Minimum": {"first": {}, "second": zclip}},
            "tail": {"AutoClip": {"history": [float("inf")], "num_steps": 0}},
        },
    }


@pytest.mark.parametrize("name", POLICIES)
def test_a_state_comes_back_as_it_was(name: str) -> None:
    policy = POLICIES[name]
    tensors = ("a", "b", "c") if norms_shape(policy) else ()
    fresh = used = group(policy, tensors=tensors)
    for step in spiky_norms(5, 1, norms_shape(policy)):
        norms = torch.tensor(step, dtype=torch.float64)
        used = used._replace(state=policy.limit(norms, used.state, context(norms))[1])
    saved = to_dict([used])
    (loaded,) = from_dict([fresh], saved)
    assert type(loaded) is type(used.state)
    assert str(loaded) == str(used.state)
    assert (str(loaded) != str(fresh.state)) == bool(name in STATEFUL)


STATEFUL = {"AutoClip", "ZClip", "AdaGC", "AdaGN", "AGGC", "minimum", "minimum per tensor"}
STATEFUL |= {"SkipSpike", "SkipSpike, raising"}


def test_entries_follow_their_tensors_and_not_their_order() -> None:
    saved = to_dict([group(AdaGC(), tensors=("a", "b"))])
    saved["groups"]["all"]["AdaGC"]["gamma"] = {"b": torch.tensor(2.0), "a": torch.tensor(1.0)}
    (loaded,) = from_dict([group(AdaGC(), tensors=("a", "b"))], saved)
    assert loaded.gamma.tolist() == [1.0, 2.0]
    assert loaded.gamma.dtype == torch.float64


def test_saved_and_loaded_tensors_share_no_memory() -> None:
    held = group(ZClip())
    saved = to_dict([held])
    (loaded,) = from_dict([held], saved)
    saved["groups"]["all"]["ZClip"]["mean"].fill_(3.0)
    assert (held.state.mean, loaded.mean) == (0.0, 0.0)


def test_a_stateless_group_may_be_missing() -> None:
    assert from_dict([group(ClipNorm(1.0))], {"version": 1, "groups": {}}) == [()]
    with pytest.raises(ValueError, match=r"policy of group 'all' is \[\].*'ZClip' here"):
        from_dict([group(ZClip())], {"version": 1, "groups": {}})


ADAGC = to_dict([group(AdaGC(), tensors=("a", "b"))])
MISMATCHES: dict[str, tuple[GroupState, dict[str, Any], str]] = {
    "version": (group(AdaGC(), tensors=("a", "b")), {**ADAGC, "version": 99}, "version is 99"),
    "policy": (group(ZClip()), ADAGC, r"policy of group 'all' is \['AdaGC'\].*'ZClip' here"),
    "tensor": (group(AdaGC(), tensors=("a", "c")), ADAGC, r"AdaGC\.gamma is \"no 'c'\""),
    "group": (group(AdaGC(), "x", ("a", "b")), ADAGC, r"policy of group 'x' is \[\]"),
    "groups": (group(ClipNorm(1.0), "x"), ADAGC, r"parameter groups is \['all'\].*\['x'\] here"),
    "shape": (
        group(AutoClip(history=5)),
        to_dict([group(AutoClip(history=7))]),
        r"shape of all\.AutoClip\.history is \(7,\).*\(5,\) here",
    ),
    "field": (
        group(ZClip()),
        {"version": 1, "groups": {"all": {"ZClip": {"mean": torch.zeros(())}}}},
        r"all\.ZClip is \['mean'\].*\['mean', 'num_steps', 'var'\] here",
    ),
    "another field": (
        group(ZClip()),
        {"version": 1, "groups": {"all": {"ZClip": {"mean": 0, "var": 0, "num_steps": 0, "z": 0}}}},
        r"all\.ZClip is \['mean', 'num_steps', 'var', 'z'\]",
    ),
    "no field": (
        group(ZClip()),
        {"version": 1, "groups": {"all": {"ZClip": [0.0, 0.0, 0]}}},
        r"all\.ZClip is \[0\.0, 0\.0, 0\].*dictionary",
    ),
    "no group": (group(ZClip()), {"version": 1, "groups": {"all": None}}, "group 'all' is None"),
    "version in a list": (
        group(ZClip()),
        {"version": [1, 1], "groups": {}},
        r"version is \[1, 1\]",
    ),
    "versions": (
        group(ZClip()),
        {"version": torch.tensor([1, 1]), "groups": {}},
        r"its version is tensor\(\[1, 1\]\)",
    ),
    "keys that have no order": (
        group(ZClip()),
        {"version": 1, "groups": {"all": {"ZClip": {"mean": 0, 1: 0, None: 0}}}},
        r"all\.ZClip is \[1, None, 'mean'\]",
    ),
    "policies that have no order": (
        group(ZClip()),
        {"version": 1, "groups": {"all": {"ZClip": {}, 1: {}}}},
        r"policy of group 'all' is \[1, 'ZClip'\]",
    ),
    "a long text": (
        group(ZClip()),
        {"version": "x" * 100_000},
        r"version is 'x{5,200}\.\.\.x{5,200}'",
    ),
    "no tensors by name": (
        group(AdaGC(), tensors=("a",)),
        {"version": 1, "groups": {"all": {"AdaGC": {"gamma": [1.0], "num_steps": 1}}}},
        r"all\.AdaGC\.gamma is \[1\.0\].*dictionary",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    held, saved, message = MISMATCHES[name]
    match = rf"cannot load the state of a Clipper: .*{message}.*Nothing was loaded"
    with pytest.raises(ValueError, match=match):
        from_dict([held], saved)


@pytest.mark.parametrize(("num_steps", "fits"), [(2**53, True), (2**53 + 1, False)])
def test_a_count_of_more_steps_than_can_be_counted(num_steps: int, fits: bool) -> None:
    """float64, in which policies compute with it, has no 2**53 + 1."""
    clipper = Clipper([("w", nn.Parameter(torch.zeros(2)))], AdaGC())
    state = {"AdaGC": {"gamma": {"w": 1.0}, "num_steps": num_steps}}
    with nullcontext() if fits else pytest.raises(ValueError, match="num_steps"):
        clipper.load_state_dict({"version": 1, "groups": {"all": state}})


def used_clipper(policy: Policy[Any], num_steps: int = 4) -> Clipper:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    clipper = Clipper([{"name": "body", "params": [("w", params[0]), ("b", params[1])]}], policy)
    for step in range(num_steps):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + step)
        clipper.clip_()
    return clipper


def put(saved: Any, path: str, value: Any) -> None:
    """Replaces what lies at `path`, such as "ZClip.mean" or "AdaGC.gamma.w"."""
    *folders, last = path.split(".")
    place = saved["groups"]["body"]
    for folder in folders:
        place = place[folder]
    place[last] = value(place[last]) if callable(value) else value


def at(index: int, value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


ADAGC_POLICY, ZCLIP, AUTOCLIP = AdaGC(warmup_steps=2), ZClip(warmup_steps=2), AutoClip(history=6)
BOTH = ZCLIP & AUTOCLIP
# The policy, what is changed in the state, to what, and what the message calls it.
NO_STATES: dict[str, tuple[Policy[Any], str, Any, str]] = {
    **{
        f"ZClip.{field} {name}": (ZCLIP, f"ZClip.{field}", value, rf"body\.ZClip\.{field}")
        for field in ("mean", "var", "num_steps")
        for name, value in {
            "negative": torch.tensor(-1.0),
            "NaN": torch.tensor(math.nan),
            "inf": torch.tensor(math.inf),
            "minus inf": -math.inf,
            "complex": torch.tensor(1 + 1j),
            "bool": torch.tensor(True),
            "Python bool": True,
            "text": "1.0",
            "None": None,
            "negative number": -3,
            "shape": torch.ones(1),
            "list": [1.0],
            "meta": torch.ones((), device="meta"),
            "sparse": torch.ones(2).to_sparse(),
        }.items()
    },
    "fractional counter": (ZCLIP, "ZClip.num_steps", 2.5, r"body\.ZClip\.num_steps is 2\.5"),
    "fractional tensor": (AUTOCLIP, "AutoClip.num_steps", torch.tensor(2.5), "num_steps"),
    "a counter beyond int64": (ZCLIP, "ZClip.num_steps", 1e30, "num_steps"),
    "not exact": (ZCLIP, "ZClip.mean", 2**53 + 1, r"body\.ZClip\.mean"),
    "gamma negative": (ADAGC_POLICY, "AdaGC.gamma.w", -1.0, r"body\.AdaGC\.gamma\['w'\] is -1\.0"),
    "gamma NaN": (ADAGC_POLICY, "AdaGC.gamma.b", math.nan, r"body\.AdaGC\.gamma\['b'\] is nan"),
    "gamma -inf": (ADAGC_POLICY, "AdaGC.gamma.b", -math.inf, r"gamma\['b'\] is -inf"),
    "gamma complex": (ADAGC_POLICY, "AdaGC.gamma.b", torch.tensor(1j), r"AdaGC\.gamma\['b'\]"),
    "gamma shape": (ADAGC_POLICY, "AdaGC.gamma.b", torch.ones(2), r"AdaGC\.gamma\['b'\]"),
    **{  # a few steps later they would be negative, and the warm-up would begin anew
        f"{type(policy).__name__}: the largest count": (
            policy,
            f"{type(policy).__name__}.num_steps",
            2**63 - 1,
            r"num_steps is 9223372036854775807",
        )
        for policy in (ADAGC_POLICY, ZCLIP, AutoClip(history=2))
    },
    "SkipSpike: the largest count": (
        SkipSpike(window=2),
        "SkipSpike.counts",
        torch.tensor([2**63 - 1, 0]),
        r"counts\[0\] is 9223372036854775807",
    ),
    "steps negative": (ADAGC_POLICY, "AdaGC.num_steps", -1, r"body\.AdaGC\.num_steps is -1"),
    "m negative": (AdaGN(), "AdaGN.mean.w", -1.0, r"body\.AdaGN\.mean\['w'\] is -1\.0"),
    "m without a step": (AdaGN(), "AdaGN.num_steps.b", 0, r"body\.AdaGN\.mean\['b'\] is "),
    "v negative": (AdaGN(), "AdaGN.rms.b", -0.5, r"body\.AdaGN\.rms\['b'\] is -0\.5"),
    "v NaN": (AdaGN(), "AdaGN.rms.b", math.nan, r"body\.AdaGN\.rms\['b'\] is nan"),
    "steps of a tensor": (AdaGN(), "AdaGN.num_steps.w", -1, r"AdaGN\.num_steps\['w'\] is -1"),
    "half a step": (AdaGN(), "AdaGN.num_steps.w", 1.5, r"AdaGN\.num_steps\['w'\] is 1\.5"),
    "average negative": (AGGC(), "AGGC.average", -1.0, r"body\.AGGC\.average is -1"),
    "AGGC's steps": (AGGC(), "AGGC.num_steps", -1, r"body\.AGGC\.num_steps is -1"),
    "history negative": (
        AUTOCLIP,
        "AutoClip.history",
        at(1, -1.0),
        r"AutoClip\.history\[1\] is -1",
    ),
    "history NaN": (AUTOCLIP, "AutoClip.history", at(3, math.nan), r"history\[3\] is nan"),
    "history inf": (AUTOCLIP, "AutoClip.history", at(0, math.inf), r"history\[0\] is inf"),
    "history too long": (AUTOCLIP, "AutoClip.history", at(4, 1.0), r"history\[4\] is 1\.0"),
    "history ragged": (AUTOCLIP, "AutoClip.history", [[1.0], 2.0], r"AutoClip\.history"),
    "more steps than history": (AUTOCLIP, "AutoClip.num_steps", 5, r"history\[4\] is inf"),
    "fewer steps than history": (AUTOCLIP, "AutoClip.num_steps", 3, r"history\[3\] is "),
    "in a minimum": (
        BOTH,
        "Minimum.second.history",
        at(2, -2.0),
        r"body\.Minimum\.second\.history\[2\] is -2",
    ),
    "in the first of a minimum": (
        BOTH,
        "Minimum.first.var",
        -1.0,
        r"body\.Minimum\.first\.var is -1",
    ),
}


@pytest.mark.parametrize("name", NO_STATES)
def test_numbers_that_no_step_leaves_are_refused_and_nothing_is_loaded(name: str) -> None:
    policy, path, value, message = NO_STATES[name]
    clipper = used_clipper(policy)
    before = str(clipper.state_dict())
    saved = used_clipper(policy).state_dict()
    clipper.load_state_dict(saved)  # as it is, it can be loaded
    put(saved, path, value)
    match = rf"cannot load the state of a Clipper: .*{message}.*Nothing was loaded"
    with pytest.raises(ValueError, match=match):
        clipper.load_state_dict(saved)
    assert str(clipper.state_dict()) == before


@pytest.mark.parametrize("name", POLICIES)
def test_a_state_from_before_the_first_step_is_loaded(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    clippers = [Clipper([("w", param)], POLICIES[name]) for _ in range(2)]
    clippers[1].load_state_dict(clippers[0].state_dict())
    assert str(clippers[1].state_dict()) == str(clippers[0].state_dict())


def test_nothing_is_loaded_where_only_the_last_group_is_broken() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    groups = [{"name": n, "params": [p]} for n, p in zip("ab", params, strict=True)]
    clipper = Clipper(groups, ZClip())
    clipper.clip_()
    before, saved = str(clipper.state_dict()), Clipper(groups, ZClip()).state_dict()
    saved["groups"]["b"]["ZClip"]["var"] = math.nan
    with pytest.raises(ValueError, match=r"b\.ZClip\.var is nan"):
        clipper.load_state_dict(saved)
    assert str(clipper.state_dict()) == before


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "JSON": lambda t: json.loads(json.dumps(t.tolist())),
    "numpy": lambda t: t.numpy(),
    "float64": lambda t: t.double(),
    "tuples": lambda t: tuple(t.tolist()) if t.ndim else t.item(),
    "bfloat16": lambda t: t.bfloat16(),  # the numbers here fit
    "parameter": lambda t: nn.Parameter(t.double()),
}


@pytest.mark.parametrize("form", NUMBERS)
@pytest.mark.parametrize(
    "policy", [ZCLIP, AUTOCLIP, ADAGC_POLICY, BOTH, AGGC(), AdaGN(0.5, 0.5)], ids=repr
)
def test_numbers_of_other_types_are_taken_where_they_fit(policy: Policy[Any], form: str) -> None:
    def whole(tensor: Tensor) -> Tensor:
        return tensor.round() if tensor.is_floating_point() else tensor

    def changed(saved: Any, change: Callable[[Tensor], Any]) -> Any:
        if isinstance(saved, dict):
            return {key: changed(value, change) for key, value in saved.items()}
        return change(saved) if isinstance(saved, Tensor) else saved

    saved = changed(used_clipper(policy).state_dict(), whole)
    one, other = used_clipper(policy, 1), used_clipper(policy, 1)
    one.load_state_dict(saved)
    other.load_state_dict(changed(saved, NUMBERS[form]))
    assert str(one.state_dict()) == str(other.state_dict())
    assert str(one.state_dict()) != str(used_clipper(policy, 1).state_dict())


class Own(NamedTuple):
    lowest: Tensor  # inf before the first step
    sign: Tensor


@dataclass(frozen=True)
class OwnPolicy(PolicyBase):
    """A state that is negative, and infinite at first."""

    scope = Scope.MODEL
    norm_type = 2.0

    def init(self, num_groups: int, device: torch.device) -> Own:
        lowest = torch.full((), math.inf, dtype=torch.float64, device=device)
        return Own(lowest, torch.full_like(lowest, -1.0))

    def limit(self, norms: Tensor, state: Own, context: Any) -> tuple[Tensor, Own]:
        lowest = torch.minimum(norms, state.lowest)
        return lowest, Own(lowest, state.sign * 2)


class OwnWithCheck(OwnPolicy):
    def valid_state(self, state: Own) -> Own:
        return Own(state.lowest > 0, state.sign < 0)


def test_states_of_policies_that_users_write() -> None:
    for policy in (OwnPolicy(), OwnWithCheck(), OwnWithCheck() & ClipNorm(1.0)):
        path = type(policy).__name__ + (".first" if isinstance(policy, Minimum) else "")
        for num_steps in (0, 3):
            saved = used_clipper(policy, num_steps).state_dict()
            clipper = used_clipper(policy, 1)
            clipper.load_state_dict(saved)  # inf, and negative
            assert str(clipper.state_dict()) == str(saved)
        for field, value in (("lowest", math.nan), ("sign", math.inf), ("sign", 1j), ("sign", 1.0)):
            saved = used_clipper(policy).state_dict()
            put(saved, f"{path}.{field}", value)
            if value == 1.0 and isinstance(policy, OwnPolicy) and type(policy) is OwnPolicy:
                used_clipper(policy).load_state_dict(saved)
                continue
            with pytest.raises(ValueError, match=rf"{path}\.{field}"):
                used_clipper(policy).load_state_dict(saved)
