"""`Report.tensor_norms`: names, modules, and what a module's norm is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distclip import ClipNorm, Clipper


def with_gradient(name: str, grad: Tensor) -> tuple[str, nn.Parameter]:
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    return name, param


def test_by_module() -> None:
    names = ["embed", "layers.0.up", "layers.0.experts.0", "layers.0.experts.1", "layers.1.up"]
    params = [with_gradient(name, torch.tensor([1.0 * i])) for i, name in enumerate(names, 1)]
    report = Clipper(params, ClipNorm(0.1), tensor_norms=True).decide().report
    zeroth, layers = math.hypot(2, 3, 4), math.hypot(2, 3, 4, 5)
    of_layers = {"layers.0": zeroth, "layers.1": 5}
    assert report.tensor_norms(prefix="layers") == pytest.approx(of_layers)
    assert report.tensor_norms(prefix="") == pytest.approx({"embed": 1, "layers": layers})
    experts = {"layers.0.experts.0": 3, "layers.0.experts.1": 4}
    assert report.tensor_norms(prefix="layers.*.experts") == pytest.approx(experts)
    assert report.tensor_norms(prefix="layer") == {}


@pytest.mark.parametrize(
    ("norm_type", "values", "norm"),
    [
        (2.0, (1e-30, 1e-30), 1e-30 * math.sqrt(2)),
        (2.0, (0.0, 0.0), 0.0),
        (3.0, (1.0, 2.0), 9 ** (1 / 3)),
        (math.inf, (1.0, 2.0), 2.0),
        (2.0, (math.inf, 1.0), math.inf),
        (2.0, (math.inf, math.nan), math.nan),
        (math.inf, (math.nan, 1.0), math.nan),
    ],
)
def test_norms_of_modules_at_the_ends(
    norm_type: float, values: tuple[float, ...], norm: float
) -> None:
    params = [with_gradient(f"layer.{i}", torch.tensor([x])) for i, x in enumerate(values)]
    report = Clipper(params, ClipNorm(1.0, norm_type), tensor_norms=True).decide().report
    found = report.tensor_norms(prefix="")["layer"]
    assert found == pytest.approx(norm, rel=1e-6, abs=0, nan_ok=True)
    assert list(report.tensor_norms().values()) == pytest.approx(values, rel=1e-6, nan_ok=True)


def test_orders_that_differ_have_no_norm_together() -> None:
    first, second = (with_gradient(name, torch.tensor([2.0, 2.0])) for name in ("m.a", "m.b"))
    groups = [
        {"params": [first], "policy": ClipNorm(1.0)},
        {"params": [second], "policy": ClipNorm(1.0, 1.0)},
    ]
    report = Clipper(groups, tensor_norms=True).clip_()
    assert report.tensor_norms() == pytest.approx({"m.a": math.sqrt(8), "m.b": 4})
    with pytest.raises(ValueError, match=r"tensors in 'm'.*orders \[1.0, 2.0\]"):
        report.tensor_norms(prefix="")


def test_equal_names_are_kept_apart() -> None:
    params = [with_gradient("w", torch.tensor([i])) for i in (1.0, 2.0, 3.0)]
    report = Clipper(params, tensor_norms=True).decide().report
    assert report.tensor_norms() == {"w": 1, "w (2)": 2, "w (3)": 3}


@pytest.mark.parametrize("mode", ["propagate", "skip", "zero"])
def test_only_skip_leaves_the_step_out(mode: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    clipper = Clipper([param], on_nonfinite=mode)
    for value, skipped in ((1.0, False), (math.nan, mode == "skip"), (1.0, False)):
        param.grad = torch.full((2,), value)
        assert bool(clipper.clip_().skipped) is skipped
