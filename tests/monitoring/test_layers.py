"""Which tensors are one layer, and the layer's norm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import distclip
from distclip.monitoring.layers import layer_norms, layers_of
from distclip.monitoring.records import read_run
from tests.monitoring.runs import make_run

NAMES = {
    "numbered": (
        ["model.embed.weight", "model.layers.0.mlp.up.weight", "model.layers.0.mlp.up.bias"],
        {"model.embed": [0], "model.layers.0": [1, 2]},
    ),
    "experts are in their layer": (
        ["layers.3.experts.0.w", "layers.3.experts.1.w", "layers.4.experts.0.w"],
        {"layers.3": [0, 1], "layers.4": [2]},
    ),
    "a sequence": (["0.weight", "0.bias", "2.weight"], {"0": [0, 1], "2": [2]}),
    "modules": (["fc1.weight", "fc1.bias", "fc2.weight"], {"fc1": [0, 1], "fc2": [2]}),
    "no module": (["weight", "scale"], {"weight": [0], "scale": [1]}),
    "a number in a tensor's name": (["w.0", "w.1", "v.0"], {"w": [0, 1], "v": [2]}),
    "what all share": (["0.layers.1.w", "0.layers.2.w"], {"0.layers.1": [0], "0.layers.2": [1]}),
    "one layer": (["layers.5.up.w", "layers.5.down.w"], {"layers.5.up": [0], "layers.5.down": [1]}),
    "one module": (["0.weight", "0.bias"], {"0": [0, 1]}),
    "tensors far apart": (["a.0.w", "b.w", "a.0.v"], {"a.0": [0, 2], "b": [1]}),
    "order of the model": (["z.1.w", "z.0.w", "a.w"], {"z.1": [0], "z.0": [1], "a": [2]}),
    "none": ([], {}),
}


@pytest.mark.parametrize("name", NAMES)
def test_layers(name: str) -> None:
    names, expected = NAMES[name]
    layers = layers_of(names)
    assert layers == expected
    assert [*layers] == [*expected]


def test_the_norm_of_a_layer_is_the_root_of_the_sum_of_squares(tmp_path: Path) -> None:
    norms = {"l.0.w": [3.0, 1.0], "l.0.b": [4.0, 0.0], "l.1.w": [2.0, 0.0]}
    names, found = layer_norms(make_run(tmp_path, norms, tensor_norms=1))
    assert names == ("l.0", "l.1")
    np.testing.assert_allclose(found, [[5.0, 2.0], [1.0, 0.0]])


@pytest.mark.parametrize("p", [1.0, 3.0, 40.0, math.inf])
def test_layers_have_the_order_of_the_policy(p: float, tmp_path: Path) -> None:
    """The norm of a layer is that of all its elements, as for `report.tensor_norms(prefix=)`."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    clipper = distclip.Clipper(model, distclip.ClipNorm(1.0, p), tensor_norms=True)
    with distclip.History(tmp_path) as history:
        for i, scale in enumerate((1.0, 1e12, math.inf)):
            for k, param in enumerate(model.parameters(), 1):
                param.grad = torch.full_like(param, float(k))
            model[0].weight.grad[0, 0] = scale
            report = clipper.decide().report
            history.append(report)
            expected = report.tensor_norms(prefix="")
            run = read_run(tmp_path)
            assert layer_norms(run)[0] == tuple(expected)
            np.testing.assert_allclose(layer_norms(run)[1][i], [*expected.values()], rtol=1e-6)
    assert "norm_type" not in run.columns


def test_large_norms_do_not_overflow(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a.w": [1.0], "a.b": [1.0], "b.w": [1.0]}, tensor_norms=1)
    large = replace(run.tensors, norms=np.array([[3e200, 4e200, 1.0]]))
    np.testing.assert_allclose(layer_norms(replace(run, tensors=large))[1], [[5e200, 1.0]])


def test_nan_is_a_missing_tensor_only_where_the_total_norm_was_finite(tmp_path: Path) -> None:
    norms = {"a.w": [3.0, 3.0], "a.b": [4.0, float("nan")], "b.w": [1.0, 1.0]}
    run = make_run(tmp_path, norms, tensor_norms=1)
    lacking = np.array([[3.0, np.nan, np.nan], [3.0, np.nan, 1.0]])
    run = replace(run, tensors=replace(run.tensors, norms=lacking))
    found = layer_norms(run)[1]
    np.testing.assert_allclose(found, [[3.0, np.nan], [np.nan, 1.0]])


def test_no_tensor_norms(tmp_path: Path) -> None:
    names, norms = layer_norms(make_run(tmp_path, {"a.w": [1.0, 2.0]}))
    assert names == ()
    assert norms.shape == (0, 0)
