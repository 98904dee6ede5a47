"""The saved form of policy states: what is under which key, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distclip.policies import AdaGC, AutoClip, ClipNorm, Policy, ZClip
from distclip.policies.adagc import AdaGCState
from distclip.policies.state_dict import GroupState, from_dict, to_dict
from tests.policies.steps import POLICIES, context, norms_shape, spiky_norms


def group(policy: Policy[Any], name: str = "all", tensors: tuple[str, ...] = ()) -> GroupState:
    state = policy.init(max(1, len(tensors)), torch.device("cpu"))
    return GroupState(name, type(policy).__name__, list(tensors) if tensors else None, state)


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


STATEFUL = {"AutoClip", "ZClip", "AdaGC", "minimum", "minimum per tensor"}


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
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    held, saved, message = MISMATCHES[name]
    match = rf"cannot load the state of a Clipper: .*{message}.*Nothing was loaded"
    with pytest.raises(ValueError, match=match):
        from_dict([held], saved)
