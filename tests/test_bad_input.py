"""Bad input gets an error that says what to do, and leaves every gradient as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from distclip import ClipNorm, Clipper, Layout, LayoutError
from tests.support.ranks import Ranks, mesh


def make_param() -> nn.Parameter:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([10.0, 20.0, 30.0])
    return param


BAD: dict[str, tuple[Callable[[nn.Parameter], object], type[Exception], str]] = {
    "p = 0": (
        lambda p: distclip.clip_grad_norm_(p, 1.0, 0.0),
        ValueError,
        r"norm_type=0\.0.*above 0",
    ),
    "p < 0": (lambda p: distclip.clip_grad_norm_(p, 1.0, -math.inf), ValueError, r"norm_type=-inf"),
    "p = NaN": (
        lambda p: distclip.get_total_norm([p.grad], math.nan),
        ValueError,
        r"norm_type=nan",
    ),
    "max_norm < 0": (
        lambda p: distclip.clip_grad_norm_(p, -1.0),
        ValueError,
        r"max_norm=-1\.0.*0 or above",
    ),
    "max_norm = NaN": (
        lambda p: distclip.clip_grad_norm_(p, math.nan),
        ValueError,
        r"max_norm=nan",
    ),
    "halves, max_norm < 0": (
        lambda p: distclip.clip_grads_with_norm_(p, -2.0, torch.tensor(3.0)),
        ValueError,
        r"max_norm=-2\.0",
    ),
    "clip_value < 0": (
        lambda p: distclip.clip_grad_value_(p, -1.0),
        ValueError,
        r"clip_value=-1\.0",
    ),
    "clip_value = NaN": (
        lambda p: distclip.clip_grad_value_(p, math.nan),
        ValueError,
        r"clip_value=nan",
    ),
    "policy": (lambda p: ClipNorm(-1.0), ValueError, r"max_norm=-1\.0"),
    "integers": (
        lambda p: distclip.clip_grad_norm_([p, torch.arange(3)], 1.0),
        ValueError,
        r"'#1'.*torch\.int64.*floating-point",
    ),
    "integers, norm": (
        lambda p: distclip.get_total_norm(torch.arange(3)),
        ValueError,
        r"torch\.int64",
    ),
    "no tensor": (lambda p: distclip.clip_grad_norm_([p, "weight"], 1.0), TypeError, r"'#1'.*str"),
    "on_nonfinite": (
        lambda p: Clipper([p], on_nonfinite="ignore"),
        ValueError,
        r"'ignore'.*\"raise\"",
    ),
    "axis twice": (
        lambda p: Layout(frozenset({"tp"}), frozenset({"tp"})),
        LayoutError,
        r"\['tp'\].*once",
    ),
    "distinct": (
        lambda p: Clipper([p], distinct=("pipe",)),
        LayoutError,
        r"\['pipe'\].*pass the `mesh=`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    call, error, message = BAD[name]
    param = make_param()
    with pytest.raises(error, match=message) as caught:
        call(param)
    assert len(str(caught.value).split()) > 20  # attempted, found, why, what to do
    assert torch.equal(param.grad, torch.tensor([10.0, 20.0, 30.0]))


def test_an_empty_generator_warns_as_in_torch() -> None:
    with pytest.warns(UserWarning, match="empty generator"):
        norm = distclip.clip_grad_norm_((p for p in ()), 1.0)
    assert norm.item() == 0.0
    assert distclip.clip_grad_norm_([], 1.0).item() == 0.0


def test_a_complex_gradient_has_no_clamp() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    param.grad = torch.tensor([3 + 4j, 1j])
    with pytest.raises(ValueError, match="complex"):
        distclip.clip_grad_value_(param, 1.0)


def test_a_model_wrapped_after_the_clipper_is_followed() -> None:
    model = nn.Linear(2, 2)
    clipper = Clipper(model)
    model.weight, model.bias = (
        nn.Parameter(model.weight.detach()),
        nn.Parameter(model.bias.detach()),
    )
    model(torch.ones(1, 2)).sum().backward()
    report = clipper.clip_()
    torch.testing.assert_close(report.total_norm.item(), 6**0.5, rtol=1e-6, atol=0)


def meshes_are_checked() -> None:
    part = DeviceMesh("cpu", [0, 1])
    param = nn.Parameter(torch.zeros(4))
    here = dist.get_rank()
    if here >= 2:
        with pytest.raises(LayoutError, match=rf"is rank {here}, but the mesh holds the ranks 0"):
            Clipper([param], mesh=part)
    two = mesh((2, 2), ("dp", "tp"))
    sharded = nn.Parameter(
        distribute_tensor(torch.zeros(4), two["dp"], [Shard(0)], src_data_rank=None)
    )
    with pytest.raises(LayoutError, match=r"\['tp'\]: it holds.*lies on rank [0-3] as well"):
        Clipper([sharded], mesh=two["tp"])
    with pytest.raises(LayoutError, match=r"no parameter.*mesh="):
        Clipper([])
    with pytest.raises(LayoutError, match=r"2 of the 4 ranks.*\['axis0'\].*one axis for each use"):
        Clipper([sharded], mesh=DeviceMesh("cpu", [0, 1, 2, 3]))

    for given, message in (
        (lambda name, param: "tp", r"'#0': `layouts=` returned 'tp'.*Return a `distclip\.Layout"),
        (
            lambda name, param: Layout(sharded={"ep"}),
            r"'#0': it names the axes \['ep'\].*\['dp', 'tp'\]",
        ),
    ):
        with pytest.raises(LayoutError, match=message):
            Clipper([param], mesh=two, layouts=given)
    for wrong in ("tp", ("tp", "tp"), {1}):
        with pytest.raises(LayoutError, match="names of mesh axes, each once"):
            Layout(sharded=wrong)


def test_meshes_are_checked(four_ranks: Ranks) -> None:
    four_ranks.run(meshes_are_checked)
