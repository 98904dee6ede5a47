"""The functions of torch.nn.utils: their results, their edge cases, and what torch gets wrong in
one process.
"""

from __future__ import annotations

import inspect
import json
import math
import pathlib
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import distclip
from tests.support import reference

CASES = json.loads((pathlib.Path(__file__).parent / "data" / "peers.json").read_text())["cases"]


def recorded(kind: str) -> list[dict]:
    return [case for case in CASES if case["kind"] == kind]


def tensors(arrays: list[dict]) -> list[Tensor]:
    return [torch.tensor([float(x) for x in a["data"]]).reshape(a["shape"]) for a in arrays]


def parameters(grads: list[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params


@pytest.mark.parametrize("case", recorded("clip_grad_norm_"), ids=lambda case: str(case["args"]))
def test_clip_grad_norm_as_torch_recorded_it(case: dict) -> None:
    params = parameters(tensors(case["inputs"]))
    *clipped, expected = tensors(case["outputs"])
    norm = distclip.clip_grad_norm_(
        params, case["args"]["max_norm"], float(case["args"]["norm_type"])
    )
    assert norm > case["args"]["max_norm"]
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for param, want in zip(params, clipped, strict=True):
        torch.testing.assert_close(param.grad, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "case", recorded("clip_by_global_norm_optax"), ids=lambda case: str(case["args"])
)
def test_clip_norm_as_optax_recorded_it(case: dict) -> None:
    params = parameters(tensors(case["inputs"]))
    report = distclip.Clipper(params, distclip.ClipNorm(case["args"]["clip_norm"])).clip_()
    assert report.to_dict()["clipped"] == (case["args"]["clip_norm"] == 0.3)
    for param, want in zip(params, tensors(case["outputs"]), strict=True):
        torch.testing.assert_close(param.grad, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_"]
)
def test_names_and_order_of_the_arguments_are_those_of_torch(name: str) -> None:
    ours = inspect.signature(getattr(distclip, name)).parameters
    torchs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    for argument, torch_argument in zip(ours.values(), torchs.values(), strict=False):
        assert argument.default == torch_argument.default
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(torchs) :])


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e9, math.inf])
@pytest.mark.parametrize("kind", ["tensor", "list", "generator", "module", "named"])
def test_every_kind_of_first_argument(kind: str, max_norm: float) -> None:
    model = nn.Linear(3, 1, bias=kind in ("list", "generator", "module", "named"))
    model(torch.ones(2, 3)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    given = {
        "tensor": model.weight,
        "list": list(model.parameters()),
        "generator": model.parameters(),
        "module": model,
        "named": model.named_parameters(),
    }[kind]
    norm = distclip.clip_grad_norm_(given, max_norm)
    torch.testing.assert_close(norm.double(), reference.total_norm(grads))
    for param, want in zip(
        model.parameters(), reference.clip_norm(grads, max_norm, eps=1e-6), strict=True
    ):
        torch.testing.assert_close(param.grad, want.float())


def test_two_halves_are_the_whole() -> None:
    grads = [torch.randn(4, 5), torch.randn(3)]
    once, halves = parameters(grads), parameters(grads)
    norm = distclip.clip_grad_norm_(once, 0.5)
    total = distclip.get_total_norm([p.grad for p in halves])
    distclip.clip_grads_with_norm_(halves, 0.5, total)
    assert torch.equal(norm, total)
    for a, b in zip(once, halves, strict=True):
        # Between the halves the norm is a float32: its rounding, and then that of the coefficient
        # and the products.
        torch.testing.assert_close(a.grad, b.grad, rtol=3e-7, atol=0)
    before = [p.grad.clone() for p in halves]
    distclip.clip_grads_with_norm_(halves, math.inf, total)
    assert all(torch.equal(p.grad, b) for p, b in zip(halves, before, strict=True))


def test_clip_grad_value_clamps_and_keeps_nan() -> None:
    param = nn.Parameter(torch.zeros(5))
    param.grad = torch.tensor([-3.0, -0.5, math.nan, math.inf, 0.2])
    distclip.clip_grad_value_(param, 1.0)
    torch.testing.assert_close(
        param.grad, torch.tensor([-1.0, -0.5, math.nan, 1.0, 0.2]), equal_nan=True
    )


def test_the_same_parameter_twice_counts_once() -> None:
    (param,) = parameters([torch.tensor([3.0, 4.0])])
    assert distclip.clip_grad_norm_([param, param], 1.0).item() == 5.0
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def test_sparse_gradients_are_coalesced_and_clipped_on_their_values() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    (table(torch.tensor([1, 1, 4])) * 5).sum().backward()
    assert not table.weight.grad.is_coalesced()
    dense = table.weight.grad.to_dense()
    norm = distclip.clip_grad_norm_(table.weight, 1.0)
    torch.testing.assert_close(norm.double(), reference.total_norm([dense]))
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), dense / norm)
    distclip.clip_grad_value_(table.weight, 0.1)
    assert table.weight.grad.to_dense().abs().max() == torch.tensor(0.1)


def test_no_gradients_and_zero_gradients() -> None:
    bare = nn.Parameter(torch.zeros(3))
    assert distclip.clip_grad_norm_([bare], 1.0).item() == 0.0
    assert bare.grad is None
    for max_norm in (0.0, 1.0):
        (param,) = parameters([torch.zeros(3)])
        assert distclip.clip_grad_norm_([bare, param], max_norm).item() == 0.0
        assert torch.equal(param.grad, torch.zeros(3))


def test_max_norm_inf_measures_and_never_writes() -> None:
    for values in ([3.0, 4.0], [math.inf, 1.0], [math.nan, 1.0]):
        (param,) = parameters([torch.tensor(values)])
        version = param.grad._version
        distclip.clip_grad_norm_(param, math.inf)
        distclip.clip_grad_norm_(param, math.inf, math.inf)
        distclip.Clipper([param], distclip.ClipNorm(math.inf)).clip_()
        assert param.grad._version == version
        torch.testing.assert_close(param.grad, torch.tensor(values), equal_nan=True)


def test_below_the_limit_nothing_is_written_on_a_cpu() -> None:
    (param,) = parameters([torch.tensor([3.0, 4.0])])
    version = param.grad._version
    distclip.clip_grad_norm_(param, 5.1)
    assert param.grad._version == version


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_gradients_propagate_as_in_torch(value: float) -> None:
    ours, torchs = (
        parameters([torch.tensor([value, 1.0])]),
        parameters([torch.tensor([value, 1.0])]),
    )
    norm = distclip.clip_grad_norm_(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs, 1.0), equal_nan=True)
    torch.testing.assert_close(ours[0].grad, torchs[0].grad, equal_nan=True)


EMPTY = "`parameters` is an empty generator, no gradient clipping will occur."


@pytest.mark.parametrize(
    "call",
    [
        lambda p: distclip.clip_grad_norm_(p, 1.0),
        lambda p: distclip.clip_grad_norm_(p, 1.0, error_if_nonfinite=True, foreach=True),
        lambda p: distclip.clip_grad_value_(p, 1.0),
        lambda p: distclip.clip_grads_with_norm_(p, 1.0, torch.tensor(2.0)),
        lambda p: distclip.Clipper(p, distclip.ClipNorm(1.0)),
        lambda p: distclip.Clipper([{"params": p}]),
        lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0),
    ],
)
def test_the_warning_of_an_empty_generator_points_at_the_caller(call: Callable) -> None:
    spent = (p for p in ())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(spent)
    assert [str(each.message) for each in caught] == [EMPTY]
    assert caught[0].category is UserWarning
    code = call.__code__
    assert (caught[0].filename, caught[0].lineno) == (code.co_filename, code.co_firstlineno)
    assert distclip.get_total_norm(p for p in ()).item() == 0.0  # torch has no warning there
    call([])


def test_an_empty_list_has_torchs_norm() -> None:
    for call in (distclip.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        norm = call([], 1.0)
        assert (norm.item(), norm.dtype, norm.shape) == (0.0, torch.float32, ())
    assert distclip.get_total_norm([]).item() == 0.0


@pytest.mark.parametrize("norm_type", [0.5, 1, 2.0, 8, "inf", math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_words_of_torchs_error(value: float, norm_type: float) -> None:
    """Tests and trainers look for them."""
    (param,) = parameters([torch.tensor([value, 1.0])])
    for utils in (torch.nn.utils, distclip):
        with pytest.raises(RuntimeError) as of_torch:
            torch.nn.utils.clip_grad_norm_(param, 1.0, norm_type, error_if_nonfinite=True)
        for call in (
            lambda utils=utils: utils.clip_grad_norm_(param, 1.0, norm_type, True),
            lambda utils=utils: utils.get_total_norm(param.grad, norm_type, True),
            lambda utils=utils: utils.get_total_norm([param.grad], norm_type, True),
        ):
            with pytest.raises(RuntimeError, match=re.escape(str(of_torch.value))):
                call()
    policy = distclip.ClipNorm(1.0, math.inf if norm_type == "inf" else norm_type)
    for clipper in (
        distclip.Clipper([param], policy, on_nonfinite="raise"),
        distclip.Clipper([param], policy, on_nonfinite="skip", max_consecutive_skips=0),
    ):
        words = str(of_torch.value).split(". To disable")[0]
        with pytest.raises(RuntimeError, match=re.escape(words)):
            clipper.clip_()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 8.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_error_if_nonfinite_names_the_parameter_and_changes_nothing(
    value: float, norm_type: float
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    model[1].weight.grad[0, 1] = value
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(distclip.NonFiniteGradientError, match=r"'1\.weight'.*rank 0"):
        distclip.clip_grad_norm_(model, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(distclip.NonFiniteGradientError, match=r"'#0'"):
        distclip.get_total_norm([model[1].weight.grad], norm_type, error_if_nonfinite=True)
    for param, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(param.grad, was, rtol=0, atol=0, equal_nan=True)
