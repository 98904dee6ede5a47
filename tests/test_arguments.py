"""Every argument of every public constructor and function, with what users pass by mistake."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distclip
from distclip import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    Clipper,
    ClipTensorNorm,
    ClipValue,
    Layout,
    SkipSpike,
    ZClip,
    functional,
)
from distclip.arguments import in_short
from distclip.sharding import BlockShard, FlatShard, ParamShard


def make_param() -> nn.Parameter:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([10.0, 20.0, 30.0])
    return param


def another(box: Box) -> torch.optim.Optimizer:
    return torch.optim.SGD([box.param], lr=0.1)


class Box:
    """What a test works on: a parameter with a gradient, and what holds it."""

    def __init__(self) -> None:
        self.param = make_param()
        self.grad = self.param.grad
        self.optimizer = torch.optim.SGD([self.param], lr=0.1)
        self.clipper = Clipper([("w", self.param)])
        self.tensor = torch.tensor([3.0, 4.0])


# One row for each argument: how to pass it, its name in the message, and what kind it is.
NUMBERS: dict[str, tuple[Callable[[Box, Any], object], str]] = {
    "ClipNorm.max_norm": (lambda b, x: ClipNorm(x), "max_norm"),
    "ClipTensorNorm.max_norm": (lambda b, x: ClipTensorNorm(x), "max_norm"),
    "ClipBlockRMS.threshold": (lambda b, x: ClipBlockRMS(x), "threshold"),
    "ClipValue.clip_value": (lambda b, x: ClipValue(x), "clip_value"),
    "AGC.clip_factor": (lambda b, x: AGC(x), "clip_factor"),
    "AGC.eps": (lambda b, x: AGC(eps=x), "eps"),
    "AGC.unit_dim": (lambda b, x: AGC(unit_dim=x), "unit_dim"),
    "AutoClip.percentile": (lambda b, x: AutoClip(x), "percentile"),
    "AutoClip.history": (lambda b, x: AutoClip(history=x), "history"),
    "ZClip.z_thresh": (lambda b, x: ZClip(x), "z_thresh"),
    "ZClip.alpha": (lambda b, x: ZClip(alpha=x), "alpha"),
    "ZClip.warmup_steps": (lambda b, x: ZClip(warmup_steps=x), "warmup_steps"),
    "ZClip.max_norm": (lambda b, x: ZClip(max_norm=x), "max_norm"),
    "SkipSpike.z_thresh": (lambda b, x: SkipSpike(x), "z_thresh"),
    "SkipSpike.window": (lambda b, x: SkipSpike(window=x), "window"),
    "SkipSpike.max_norm": (lambda b, x: SkipSpike(max_norm=x), "max_norm"),
    "AdaGC.ratio": (lambda b, x: AdaGC(x), "ratio"),
    "AdaGC.max_norm": (lambda b, x: AdaGC(max_norm=x), "max_norm"),
    "AdaGC.beta": (lambda b, x: AdaGC(beta=x), "beta"),
    "AdaGC.warmup_steps": (lambda b, x: AdaGC(warmup_steps=x), "warmup_steps"),
    "AdaGN.gamma1": (lambda b, x: AdaGN(gamma1=x), "gamma1"),
    "AdaGN.gamma2": (lambda b, x: AdaGN(gamma2=x), "gamma2"),
    "AdaGN.eps": (lambda b, x: AdaGN(eps=x), "eps"),
    "AGGC.low": (lambda b, x: AGGC(low=x), "low"),
    "AGGC.high": (lambda b, x: AGGC(high=x), "high"),
    "AGGC.beta": (lambda b, x: AGGC(beta=x), "beta"),
    "AGGC.max_down": (lambda b, x: AGGC(max_down=x), "max_down"),
    "AGGC.max_up": (lambda b, x: AGGC(max_up=x), "max_up"),
    "AGGC.late_low": (lambda b, x: AGGC(late_low=x), "late_low"),
    "AGGC.late_high": (lambda b, x: AGGC(late_high=x), "late_high"),
    "AGGC.late_from": (lambda b, x: AGGC(late_from=x), "late_from"),
    "AGGC.late_steps": (lambda b, x: AGGC(late_steps=x), "late_steps"),
    "ClipNorm.norm_type": (lambda b, x: ClipNorm(1.0, x), "norm_type"),
    "ClipTensorNorm.norm_type": (lambda b, x: ClipTensorNorm(1.0, x), "norm_type"),
    "AGC.norm_type": (lambda b, x: AGC(norm_type=x), "norm_type"),
    "clip_grad_norm_.max_norm": (lambda b, x: distclip.clip_grad_norm_(b.param, x), "max_norm"),
    "clip_grad_norm_.norm_type": (
        lambda b, x: distclip.clip_grad_norm_(b.param, 1.0, x),
        "norm_type",
    ),
    "get_total_norm.norm_type": (lambda b, x: distclip.get_total_norm(b.grad, x), "norm_type"),
    "clip_grads_with_norm_.max_norm": (
        lambda b, x: distclip.clip_grads_with_norm_(b.param, x, torch.tensor(9.0)),
        "max_norm",
    ),
    "clip_grads_with_norm_.total_norm": (
        lambda b, x: distclip.clip_grads_with_norm_(b.param, 1.0, x),
        "total_norm",
    ),
    "clip_grad_value_.clip_value": (
        lambda b, x: distclip.clip_grad_value_(b.param, x),
        "clip_value",
    ),
    "clip_by_norm.clip_norm": (lambda b, x: functional.clip_by_norm(b.tensor, x), "clip_norm"),
    "clip_by_norm.axes": (lambda b, x: functional.clip_by_norm(b.tensor, 1.0, x), "axes"),
    "clip_by_global_norm.clip_norm": (
        lambda b, x: functional.clip_by_global_norm([b.tensor], x),
        "clip_norm",
    ),
    "clip_by_global_norm.use_norm": (
        lambda b, x: functional.clip_by_global_norm([b.tensor], 1.0, x),
        "use_norm",
    ),
    "clip_by_value.min": (
        lambda b, x: functional.clip_by_value(b.tensor, x, 9.0),
        "clip_value_min",
    ),
    "clip_by_value.max": (
        lambda b, x: functional.clip_by_value(b.tensor, -1.0, x),
        "clip_value_max",
    ),
    "Clipper.max_consecutive_skips": (
        lambda b, x: Clipper([b.param], max_consecutive_skips=x),
        "max_consecutive_skips",
    ),
    "clip_.scale": (lambda b, x: b.clipper.clip_(scale=x), "scale"),
    "decide.scale": (lambda b, x: b.clipper.decide(scale=x), "scale"),
    "step.scale": (lambda b, x: b.clipper.step(b.optimizer, scale=x), "scale"),
    "apply_.scale": (lambda b, x: b.clipper.decide().apply_(lambda p: p.grad, x), "scale"),
    "BlockShard.global_shape": (lambda b, x: BlockShard(x, (0,), (1,)), "global_shape"),
    "BlockShard.offsets": (lambda b, x: BlockShard((1,), x, (1,)), "offsets"),
    "BlockShard.sizes": (lambda b, x: BlockShard((1,), (0,), x), "sizes"),
    "FlatShard.global_shape": (lambda b, x: FlatShard(x, 0, 0, 1, ()), "global_shape"),
    "FlatShard.start": (lambda b, x: FlatShard((3,), x, 0, 1, ()), "start"),
    "FlatShard.offset": (lambda b, x: FlatShard((3,), 0, x, 1, ()), "offset"),
    "FlatShard.numel": (lambda b, x: FlatShard((3,), 0, 0, x, ()), "numel"),
    "FlatShard.boundaries": (lambda b, x: FlatShard((3,), 0, 0, 1, x), "boundaries"),
    "ParamShard.numel": (lambda b, x: ParamShard("w", x, BlockShard.whole((1,))), "numel"),
}
# What is no number, by what the message calls it.
NO_NUMBERS: dict[str, Any] = {
    "None": None,
    "text": "1e-3",
    "word": "none",
    "list": ["1.0"],
    "dict": {"max_norm": 1.0},
    "bool": True,
    "numpy bool": np.bool_(True),
    "bool tensor": torch.tensor(True),
    "complex": 1j,
    "complex tensor": torch.tensor(1j),
    "class": float,
    "function": math.sqrt,
    "tensor of two": torch.tensor([[1.0, 2.0]]),
    "array of two": np.array([[1.0, 2.0]]),
    "array of text": np.array("1.0"),
    "parameters": [make_param()],
    "module": nn.Linear(2, 2),
    "meta tensor": torch.ones((), device="meta"),
}
ALLOWED = {
    ("ZClip.max_norm", "None"),
    *((name, "None") for name in NUMBERS if name.endswith((".scale", ".axes", ".use_norm"))),
    # A tensor with one element is waited for late: these do not look at it.
    *((name, "meta tensor") for name in NUMBERS if name.endswith(".scale")),
    ("clip_grads_with_norm_.total_norm", "meta tensor"),
    ("clip_by_global_norm.use_norm", "meta tensor"),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("argument", NUMBERS)
def test_what_is_no_number_is_refused_by_name(argument: str, kind: str) -> None:
    if (argument, kind) in ALLOWED:
        return
    (call, name), box = NUMBERS[argument], Box()
    with pytest.raises((TypeError, ValueError)) as caught:
        call(box, NO_NUMBERS[kind])
    text = str(caught.value)
    assert re.search(rf"\b{name}\b", text) or "cannot scale by" in text, text
    assert re.search(r"\b(Pass|Return) ", text), text
    assert text.startswith("cannot "), text
    assert torch.equal(box.param.grad, torch.tensor([10.0, 20.0, 30.0]))
    if kind == "text" and not argument.partition(".")[0].endswith("Shard"):
        assert "YAML" in text
    # The refused call was no step, and left nothing behind.
    assert box.clipper.clip_().total_norm.item() == pytest.approx(math.sqrt(1400))


def test_the_table_has_every_argument_that_is_a_number() -> None:
    """A field that is added to a policy gets a row here."""
    limits = (ClipNorm, ClipTensorNorm, ClipBlockRMS, ClipValue, AGC, AutoClip, ZClip, AdaGC)
    for policy in (*limits, SkipSpike, AdaGN, AGGC):
        for field in policy.__dataclass_fields__:
            assert f"{policy.__name__}.{field}" in NUMBERS or field == "exclude"


OUT_OF_RANGE = {
    "NaN": math.nan,
    "minus infinity": -math.inf,
    "negative": -1.5,
    "numpy NaN": np.float32("nan"),
    "NaN tensor": torch.tensor(math.nan),
    "half below 0": np.float16(-0.5),
}


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
@pytest.mark.parametrize("argument", NUMBERS)
def test_numbers_out_of_range_are_refused_by_name(argument: str, kind: str) -> None:
    late = argument.endswith(("scale", "total_norm", "use_norm")) or "clip_by_value" in argument
    if late and argument != "clip_grads_with_norm_.total_norm":
        return
    if argument == "clip_grads_with_norm_.total_norm" and "NaN" in kind:
        return
    (call, name), box = NUMBERS[argument], Box()
    with pytest.raises(ValueError, match=name) as caught:
        call(box, OUT_OF_RANGE[kind])
    assert re.search(r"\b(Pass|Return) ", str(caught.value))
    assert torch.equal(box.param.grad, torch.tensor([10.0, 20.0, 30.0]))


ONE: dict[str, Any] = {
    "int": 1,
    "float": 1.0,
    "fraction": Fraction(1),
    "numpy float64": np.float64(1),
    "numpy float32": np.float32(1),
    "numpy int64": np.int64(1),
    "numpy uint8": np.uint8(1),
    "0-d array": np.array(1.0),
    "array with one element": np.array([1]),
    "0-d tensor": torch.tensor(1.0),
    "0-d int tensor": torch.tensor(1),
    "bfloat16 tensor": torch.tensor(1.0, dtype=torch.bfloat16),
    "parameter": nn.Parameter(torch.ones(())),
}


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("make", [ClipNorm, ClipTensorNorm, ClipBlockRMS, ClipValue, AGC, AutoClip])
def test_numbers_are_stored_as_those_of_python(make: Callable[..., Any], kind: str) -> None:
    policy = make(ONE[kind])
    assert policy == make(1.0)
    assert hash(policy) == hash(make(1.0))
    assert repr(policy) == repr(make(1.0))  # what ranks compare
    for field in policy.__dataclass_fields__:
        assert type(getattr(policy, field)) in (int, float, tuple)


@pytest.mark.parametrize("kind", ONE)
def test_every_function_takes_numbers_of_any_type(kind: str) -> None:
    one = ONE[kind]
    for call in (
        lambda p: distclip.clip_grad_norm_([p], one, one),
        lambda p: distclip.clip_grad_norm_([p], one),
        lambda p: distclip.clip_grad_value_([p], one),
        lambda p: distclip.clip_grads_with_norm_([p], one, 9.0),
        lambda p: distclip.clip_grads_with_norm_([p], 1.0, one),
        lambda p: Clipper([p], ZClip(one, one, 1, one)).clip_(),
        lambda p: Clipper([p], max_consecutive_skips=one).clip_(scale=one),
        lambda p: Clipper([p], AdaGC(one, one, one, 3)).clip_(),
    ):
        found, expected = make_param(), make_param()
        call(found)
        call_with_float = functools.partial(_with_float, call, one)
        call_with_float(expected)
        assert torch.equal(found.grad, expected.grad)
    vector = torch.tensor([3.0, 4.0])
    want = torch.tensor([0.6, 0.8])
    torch.testing.assert_close(functional.clip_by_norm(vector, one), want)
    torch.testing.assert_close(functional.clip_by_norm(vector[None], one, one), want[None])
    torch.testing.assert_close(functional.clip_by_global_norm([vector], one)[0][0], want)
    torch.testing.assert_close(functional.clip_by_global_norm([vector], 5.0, one)[1].item(), 1.0)
    assert functional.clip_by_value(vector, one, one).tolist() == [1.0, 1.0]


def _with_float(call: Callable[[nn.Parameter], object], one: Any, param: nn.Parameter) -> None:
    """The same call with 1.0 in the place of `one`."""
    cell = call.__closure__[0]  # type: ignore[index]
    before, cell.cell_contents = cell.cell_contents, 1.0
    try:
        call(param)
    finally:
        cell.cell_contents = before


def test_inf_is_a_norm_type_everywhere() -> None:
    for norm_type in ("inf", math.inf, np.float32("inf"), np.str_("inf"), torch.tensor(math.inf)):
        assert distclip.clip_grad_norm_(make_param(), 1.0, norm_type).item() == 30.0
        assert distclip.get_total_norm(make_param().grad, norm_type).item() == 30.0
        assert ClipNorm(1.0, norm_type).norm_type == math.inf
        assert Clipper([make_param()], ClipNorm(1.0, norm_type)).clip_().total_norm.item() == 30.0
        assert ClipTensorNorm(1.0, norm_type) == ClipTensorNorm(1.0, math.inf)
        assert AGC(norm_type=norm_type) == AGC(norm_type=math.inf)


def test_zclip_without_a_bound_as_its_authors_write_it() -> None:
    assert ZClip(max_norm=None) == ZClip(max_norm=math.inf)
    assert Clipper([make_param()], ZClip(max_norm=None)).clip_().coefficient.item() == 1.0


# What is neither a number nor right: the call, and what the message says.
WRONG: dict[str, tuple[Callable[[Box], object], str]] = {
    # swapped, missing, of another kind
    "clip_grad_norm_ swapped": (
        lambda b: distclip.clip_grad_norm_(1.0, [b.param]),
        r"max_norm=.*is a list",
    ),
    "clip_grad_norm_(1.0, 1.0)": (
        lambda b: distclip.clip_grad_norm_(1.0, 1.0),
        "1.0: it is a float",
    ),
    "clip_grad_norm_(None)": (lambda b: distclip.clip_grad_norm_(None, 1.0), "NoneType"),
    "clip_grad_norm_('w')": (lambda b: distclip.clip_grad_norm_("weight", 1.0), "'weight'.*str"),
    "clip_grad_norm_(optimizer)": (
        lambda b: distclip.clip_grad_norm_(b.optimizer, 1.0),
        "SGD.*Pass the model",
    ),
    "clip_grad_norm_(dict)": (
        lambda b: distclip.clip_grad_norm_({"w": b.param}, 1.0),
        "dict.*its values",
    ),
    "clip_grad_norm_(groups)": (
        lambda b: distclip.clip_grad_norm_(b.optimizer.param_groups, 1.0),
        "'#0'.*parameter group.*for p in group",
    ),
    "clip_grad_norm_(parameter, groups)": (
        lambda b: distclip.clip_grad_norm_([b.param, {"params": [b.param]}], 1.0),
        "'#1'.*parameter group",
    ),
    "clip_grad_norm_(nested)": (
        lambda b: distclip.clip_grad_norm_([[b.param]], 1.0),
        "'#0'.*is a list",
    ),
    "clip_grad_norm_(pair of parameters)": (
        lambda b: distclip.clip_grad_norm_([(b.param, make_param())], 1.0),
        "'#0'.*tuple of 2 items.*flat",
    ),
    "get_total_norm(groups)": (
        lambda b: distclip.get_total_norm(b.optimizer.param_groups),
        "'#0'.*parameter group",
    ),
    "get_total_norm(dict)": (lambda b: distclip.get_total_norm({"w": b.grad}), "its values"),
    "get_total_norm(None)": (lambda b: distclip.get_total_norm(None), "NoneType"),
    "clip_grads_with_norm_(groups)": (
        lambda b: distclip.clip_grads_with_norm_(b.optimizer.param_groups, 1.0, 9.0),
        "'#0'.*parameter group",
    ),
    "clip_grads_with_norm_ swapped": (
        lambda b: distclip.clip_grads_with_norm_(b.param, torch.tensor([1.0, 2.0]), 1.0),
        "max_norm=",
    ),
    "clip_grad_value_(groups)": (
        lambda b: distclip.clip_grad_value_(b.optimizer.param_groups, 1.0),
        "'#0'.*parameter group",
    ),
    "clip_grad_value_ swapped": (
        lambda b: distclip.clip_grad_value_(1.0, [b.param]),
        "clip_value=",
    ),
    "clip_grad_value_(None)": (lambda b: distclip.clip_grad_value_(None, 1.0), "NoneType"),
    "error_if_nonfinite": (
        lambda b: distclip.clip_grad_norm_(b.param, 1.0, 2.0, "False"),
        "error_if_nonfinite='False'",
    ),
    "get_total_norm error_if_nonfinite": (
        lambda b: distclip.get_total_norm(b.grad, 2.0, None),
        "error_if_nonfinite=None",
    ),
    "foreach": (
        lambda b: distclip.clip_grad_norm_(b.param, 1.0, foreach="cuda"),
        "foreach='cuda'",
    ),
    "clip_grad_value_ foreach": (
        lambda b: distclip.clip_grad_value_(b.param, 1.0, 2.0),
        "foreach=2.0",
    ),
    "mesh": (lambda b: distclip.clip_grad_norm_(b.param, 1.0, mesh="dp"), "mesh='dp'"),
    "get_total_norm mesh": (lambda b: distclip.get_total_norm(b.grad, mesh=4), "mesh=4"),
    "distinct": (
        lambda b: distclip.clip_grad_norm_(b.param, 1.0, distinct="pp"),
        r"distinct='pp'.*tuple",
    ),
    "get_total_norm distinct": (
        lambda b: distclip.get_total_norm(b.grad, distinct=None),
        "distinct=None",
    ),
    # the Clipper
    "Clipper(None)": (lambda b: Clipper(None), "None: it is a NoneType"),
    "Clipper(1.0)": (lambda b: Clipper(1.0), "1.0: it is a float"),
    "Clipper(optimizer)": (lambda b: Clipper(b.optimizer), "SGD.*Pass the model"),
    "Clipper(dict)": (lambda b: Clipper({"w": b.param}), "its values"),
    "Clipper([dict, parameter])": (
        lambda b: Clipper([{"params": [b.param]}, make_param()]),
        "'#0'.*parameter group",
    ),
    "Clipper swapped": (
        lambda b: Clipper(ClipNorm(1.0), [b.param]),
        r"ClipNorm.*Clipper\(model, policy\)",
    ),
    "Clipper(model, 1.0)": (lambda b: Clipper([b.param], 1.0), "policy 1.0"),
    "Clipper(model, None)": (lambda b: Clipper([b.param], None), "policy None"),
    "Clipper(model, 'norm')": (lambda b: Clipper([b.param], "norm"), "policy 'norm'"),
    "Clipper(model, ClipNorm)": (lambda b: Clipper([b.param], ClipNorm), "is a class"),
    "Clipper(groups, 1.0)": (
        lambda b: Clipper([{"params": [b.param], "policy": ClipNorm(1.0)}], 1.0),
        "policy 1.0",
    ),
    "policy of a group": (
        lambda b: Clipper([{"params": [b.param], "policy": 1.0, "name": "head"}]),
        "policy 1.0 of group 'head'",
    ),
    "Clipper mesh": (lambda b: Clipper([b.param], mesh=("dp",)), "mesh="),
    "Clipper distinct": (lambda b: Clipper([b.param], distinct="pp"), "distinct='pp'"),
    "Clipper distinct of numbers": (lambda b: Clipper([b.param], distinct=(0,)), "distinct="),
    "Clipper layouts": (
        lambda b: Clipper([b.param], layouts={"w": Layout()}),
        "layouts=.*distclip.Layout",
    ),
    "Clipper gradient": (lambda b: Clipper([b.param], gradient="main_grad"), "gradient='main"),
    "Clipper overlap": (lambda b: Clipper([b.param], overlap="no"), "overlap='no'"),
    "Clipper on_nonfinite None": (
        lambda b: Clipper([b.param], on_nonfinite=None),
        "on_nonfinite=None",
    ),
    "Clipper on_nonfinite list": (
        lambda b: Clipper([b.param], on_nonfinite=["skip"]),
        r"on_nonfinite=\['skip'\]",
    ),
    "Clipper max_consecutive_skips": (
        lambda b: Clipper([b.param], max_consecutive_skips=2.5),
        "max_consecutive_skips=2.5",
    ),
    # groups
    "group without params": (lambda b: Clipper([{"policy": ClipNorm(1.0)}]), "no 'params'"),
    "empty group": (lambda b: Clipper([{}]), "'group0'.*no 'params'"),
    "group with a limit": (
        lambda b: Clipper([{"params": [b.param], "max_norm": 0.1}]),
        "'group0'.*'max_norm'",
    ),
    "group with a typo": (
        lambda b: Clipper([{"params": [b.param], "polcy": ClipNorm(1.0)}]),
        "'polcy'",
    ),
    "group with another name": (
        lambda b: Clipper([{"params": [b.param], "names": "head"}]),
        "'names'",
    ),
    "group of an optimizer with a limit": (
        lambda b: Clipper([{"params": [b.param], "lr": 0.1, "clip_value": 0.1}]),
        "'clip_value'",
    ),
    "group of an optimizer with a typo": (
        lambda b: Clipper([{"params": [b.param], "lr": 0.1, "Policy": ClipNorm(1.0)}]),
        "'Policy'",
    ),
    "params of a group": (lambda b: Clipper([{"params": None}]), "None: it is a NoneType"),
    "params of a group that are a dict": (
        lambda b: Clipper([{"params": {"w": b.param}}]),
        "its values",
    ),
    # the methods
    "clip_('x')": (lambda b: b.clipper.clip_("x"), "optimizer='x'"),
    "clip_(1.0)": (lambda b: b.clipper.clip_(1.0), "optimizer=1.0"),
    "clip_(parameters)": (lambda b: b.clipper.clip_([b.param]), "optimizer="),
    "clip_(groups)": (lambda b: b.clipper.clip_(b.optimizer.param_groups), "optimizer="),
    "clip_({})": (lambda b: b.clipper.clip_({"a": b.optimizer}), "optimizer="),
    "clip_([optimizer, None])": (
        lambda b: b.clipper.clip_([b.optimizer, None]),
        "optimizer=None",
    ),
    "decide('x')": (lambda b: b.clipper.decide("x"), "optimizer='x'"),
    "decide(scaler)": (
        lambda b: b.clipper.decide(torch.amp.GradScaler("cpu")),
        "optimizer=.*GradScaler",
    ),
    "clip_(optimizer, optimizer)": (
        lambda b: b.clipper.clip_(b.optimizer, b.optimizer),
        "scaler=.*GradScaler",
    ),
    "decide(scaler=True)": (
        lambda b: b.clipper.decide(b.optimizer, scaler=True),
        "scaler=True",
    ),
    "step(None)": (lambda b: b.clipper.step(None), "no optimizer was given"),
    "step([])": (lambda b: b.clipper.step([]), "no optimizer was given"),
    "step('x')": (lambda b: b.clipper.step("x"), "optimizer='x'"),
    "step(optimizer, closure)": (
        lambda b: b.clipper.step(b.optimizer, lambda: 1.0),
        "scaler=.*closure=",
    ),
    "step closure": (
        lambda b: b.clipper.step(b.optimizer, closure=1.0),
        "closure=1.0",
    ),
    "step two with a closure": (
        lambda b: b.clipper.step([b.optimizer, another(b)], closure=lambda: 1.0),
        "2 optimizers with one closure",
    ),
    "step none with a closure": (
        lambda b: b.clipper.step([], closure=lambda: 1.0),
        "no optimizer was given",
    ),
    "attach(None)": (lambda b: b.clipper.attach(None), "optimizer=None"),
    "attach('x')": (lambda b: b.clipper.attach("x"), "optimizer='x'"),
    "attach([])": (lambda b: b.clipper.attach([]), r"optimizer=\[\]"),
    "attach scaler": (lambda b: b.clipper.attach(b.optimizer, 2.0), "scaler=2.0"),
    "apply_(1.0)": (lambda b: b.clipper.decide().apply_(1.0), "gradient=1.0"),
    "apply_({})": (lambda b: b.clipper.decide().apply_({"w": b.grad}), "gradient="),
    "load_state_dict(None)": (lambda b: b.clipper.load_state_dict(None), "None is a NoneType"),
    "load_state_dict([])": (lambda b: b.clipper.load_state_dict([]), r"\[\] is a list"),
    "load_state_dict('x')": (lambda b: b.clipper.load_state_dict("x"), "'x' is a str"),
    "load_state_dict({})": (lambda b: b.clipper.load_state_dict({}), "its version is None"),
    "load_state_dict groups": (
        lambda b: b.clipper.load_state_dict({"version": 1, "groups": []}),
        "its groups is",
    ),
    # policies
    "AGC exclude None": (lambda b: AGC(exclude=None), "exclude=None"),
    "AGC exclude text": (lambda b: AGC(exclude="head"), "exclude='head'"),
    "AGC exclude module": (lambda b: AGC(exclude=nn.Linear(1, 1)), "exclude=.*tuple"),
    "AGC exclude parameters": (lambda b: AGC(exclude=(b.param,)), "exclude=.*tuple"),
    "ClipNorm & 1.0": (lambda b: ClipNorm(1.0) & 1.0, "policy 1.0"),
    # functional
    "clip_by_norm t": (lambda b: functional.clip_by_norm([3.0, 4.0], 1.0), r"t=\[3.0, 4.0\]"),
    "clip_by_norm None": (lambda b: functional.clip_by_norm(None, 1.0), "t=None"),
    "clip_by_norm swapped": (lambda b: functional.clip_by_norm(1.0, b.tensor), "clip_norm="),
    "clip_by_norm axes text": (lambda b: functional.clip_by_norm(b.tensor, 1.0, "0"), "axes='0'"),
    "clip_by_norm axes 0.5": (
        lambda b: functional.clip_by_norm(b.tensor, 1.0, [0.5]),
        r"axes=\[0.5\].*whole",
    ),
    "clip_by_global_norm dict": (
        lambda b: functional.clip_by_global_norm({"w": b.tensor}, 1.0),
        "its values",
    ),
    "clip_by_global_norm tensor": (
        lambda b: functional.clip_by_global_norm(b.tensor, 1.0),
        "t_list.*list of its rows",
    ),
    "clip_by_global_norm None": (lambda b: functional.clip_by_global_norm(None, 1.0), "None"),
    "clip_by_global_norm number": (
        lambda b: functional.clip_by_global_norm([b.tensor, 1.0], 1.0),
        "#1=1.0",
    ),
    "clip_by_value t": (lambda b: functional.clip_by_value(1.0, 0.0, 1.0), "t=1.0"),
    "clip_by_value array": (
        lambda b: functional.clip_by_value(np.ones(2), 0.0, 1.0),
        "t=array.*as_tensor",
    ),
    # records of sharding
    "Layout sharded": (lambda b: Layout(sharded="tp"), "sharded='tp'"),
    "Layout sharded None": (lambda b: Layout(sharded=None), "sharded=None"),
    "Layout replicated": (lambda b: Layout(replicated=(1,)), "replicated="),
    "Layout parts": (lambda b: Layout(parts=("w",)), "parts="),
    "Layout one part": (lambda b: Layout(parts=None), "parts=None"),
    "Layout counted": (lambda b: Layout(counted="yes"), "counted='yes'"),
    "BlockShard outside": (lambda b: BlockShard((4,), (3,), (2,)), "inside a tensor"),
    "BlockShard negative": (lambda b: BlockShard((4,), (-1,), (2,)), "inside a tensor"),
    "BlockShard dims": (lambda b: BlockShard((4, 2), (0,), (2,)), "inside a tensor"),
    "BlockShard number": (lambda b: BlockShard(4, 0, 2), "global_shape=4"),
    "BlockShard fraction": (lambda b: BlockShard((4,), (0.5,), (2,)), "offsets=0.5"),
    "BlockShard sharded_dims": (
        lambda b: BlockShard((4,), (0,), (2,), frozenset({1})),
        "sharded_dims=",
    ),
    "BlockShard axis name": (
        lambda b: BlockShard((4,), (0,), (2,), {"tp"}),
        "sharded_dims=",
    ),
    "FlatShard outside": (lambda b: FlatShard((4,), 3, 0, 2, ()), "elements from 3"),
    "FlatShard negative": (lambda b: FlatShard((4,), -1, 0, 2, ()), "elements from -1"),
    "FlatShard numel": (lambda b: FlatShard((4,), 0, 0, -2, ()), "FlatShard of -2"),
    "ParamShard name": (lambda b: ParamShard(None, 4, BlockShard.whole((4,))), "name=None"),
    "ParamShard shard": (lambda b: ParamShard("w", 4, None), "shard=None"),
    "ParamShard numel": (lambda b: ParamShard("w", -1, BlockShard.whole((4,))), "numel=-1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_and_named(case: str) -> None:
    (call, message), box = WRONG[case], Box()
    with pytest.raises((TypeError, ValueError), match=f"(?s)cannot .*{message}") as caught:
        call(box)
    text = str(caught.value)
    assert re.search(r"\b(Pass|Return|Correct|Name|Make|Call|Combine)\b", text), text
    assert len(text.split()) > 18  # attempted, found, why, what to do
    assert torch.equal(box.param.grad, torch.tensor([10.0, 20.0, 30.0]))
    assert torch.equal(box.param.detach(), torch.zeros(3))
    assert box.clipper.clip_().total_norm.item() == pytest.approx(math.sqrt(1400))


OPTIMIZERS = [
    getattr(torch.optim, name)
    for name in vars(torch.optim)
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer",)
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_the_groups_of_every_optimizer_are_taken(make: Callable[..., Any]) -> None:
    """Before the optimizer has them, when it has, and after a scheduler."""
    param = nn.Parameter(torch.zeros(3, 2))
    param.grad = torch.ones(3, 2)
    settings = {"lr": 0.1} if make.__name__ in ("SGD",) else {}
    optimizer = make([{"params": [param], "name": "body"}], **settings)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    clipper = Clipper(optimizer.param_groups, ClipNorm(1.0))
    assert clipper.clip_().norms["body"].item() == pytest.approx(math.sqrt(6))
    keys = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("lr", "initial_lr")}
    assert Clipper([keys], ClipNorm(1.0)).clip_().norms["body"].item() == pytest.approx(1.0)


def test_groups_for_an_optimizer_may_have_keys_of_their_own() -> None:
    group = {"params": [make_param()], "lr": 0.1, "lr_scale": 0.5, "use_muon": True, "k": 3}
    assert Clipper([group]).clip_().total_norm.item() == pytest.approx(math.sqrt(1400))


def test_flags_and_names_of_other_types() -> None:
    for yes in (True, np.bool_(True), torch.tensor(True)):
        param = make_param()
        param.grad[0] = math.nan
        with pytest.raises(distclip.NonFiniteGradientError):
            distclip.clip_grad_norm_(param, 1.0, error_if_nonfinite=yes)
        assert Clipper([make_param()], overlap=yes).clip_().total_norm > 0
    for axes in (["pp"], ("pp",), {"pp"}, ()):
        assert distclip.clip_grad_norm_(make_param(), 1.0, distinct=axes) > 0
        assert Clipper([make_param()], distinct=axes).clip_().total_norm > 0
    assert distclip.clip_grad_norm_(make_param(), 1.0, 2.0, False, True) > 0  # foreach
    assert Clipper([make_param()], max_consecutive_skips=math.inf).clip_().total_norm > 0
    assert AGC(exclude={"b", "a"}) == AGC(exclude=("a", "b"))
    assert Layout(parts=[]) == Layout(parts=())
    shard = BlockShard([np.int64(4), 2], torch.Size([0, 0]), torch.tensor([4, 2]), {-1})
    assert shard == BlockShard((4, 2), (0, 0), (4, 2), frozenset({1}))
    assert hash(shard) == hash(BlockShard((4, 2), (0, 0), (4, 2), frozenset({1})))


def test_a_state_that_went_through_json() -> None:
    clippers = [Clipper([("w", make_param())], ZClip(warmup_steps=2)) for _ in range(2)]
    for _ in range(3):
        clippers[0].clip_()
    saved = json.loads(json.dumps(clippers[0].state_dict(), default=lambda t: t.tolist()))
    clippers[1].load_state_dict(saved)
    assert str(clippers[1].state_dict()) == str(clippers[0].state_dict())


def test_many_names_are_cut_short() -> None:
    assert in_short([*"abcdefgh"]) == "a, b, c, d, e, f, g, h"
    assert in_short([*"abcdefghi"]) == "a, b, c, d, e, f, ..., i"
