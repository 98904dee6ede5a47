"""TensorFlow's functions: as TensorFlow recorded them, and the same on DTensors as on whole
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import (
    _StridedShard,
)  # what FSDP2 over tensor parallelism makes

from distclip.functional import clip_by_global_norm, clip_by_norm, clip_by_value
from tests.support import reference
from tests.support.layouts import LAYOUTS, UNSHARDED, Placed, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, device_of, mesh, same_bits_everywhere
from tests.support.tolerances import NORM, TOLERANCES
from tests.support.torch_versions import STRIDED_SHARD
from tests.test_api import recorded, tensors

AS_RECORDED = {"rtol": 1e-6, "atol": 0.0, "equal_nan": True}  # TensorFlow sums in float32
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64]


R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def case_name(case: dict) -> str:
    return "-".join(map(str, case["args"].values()))


@pytest.mark.parametrize("case", recorded("clip_by_norm"), ids=case_name)
def test_clip_by_norm_as_tensorflow_recorded_it(case: dict) -> None:
    (tensor,), (want,) = tensors(case["inputs"]), tensors(case["outputs"])
    before = tensor.clone()
    torch.testing.assert_close(clip_by_norm(tensor, **case["args"]), want, **AS_RECORDED)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("case", recorded("clip_by_global_norm"), ids=case_name)
def test_clip_by_global_norm_as_tensorflow_recorded_it(case: dict) -> None:
    given = [None if a is None else tensors([a])[0] for a in case["inputs"]]
    *wanted, norm = [None if a is None else tensors([a])[0] for a in case["outputs"]]
    before = [t if t is None else t.clone() for t in given]
    clipped, found = clip_by_global_norm(given, **case["args"])
    torch.testing.assert_close(found, norm, **AS_RECORDED)
    for got, want in zip(clipped, wanted, strict=True):
        assert (got is None) == (want is None)
        torch.testing.assert_close(
            got if got is not None else norm, want if want is not None else norm, **AS_RECORDED
        )
    for tensor, was in zip(given, before, strict=True):
        torch.testing.assert_close(tensor, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", recorded("clip_by_value"), ids=case_name)
def test_clip_by_value_as_tensorflow_recorded_it(case: dict) -> None:
    (tensor,), (want,) = tensors(case["inputs"]), tensors(case["outputs"])
    before = tensor.clone()
    assert torch.equal(clip_by_value(tensor, case["args"]["min"], case["args"]["max"]), want)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("axes", [None, 0, [1], [-1], [0, 2], [], [1, -2], [0, 1, 2]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_by_norm_over_any_dims(dtype: torch.dtype, axes: int | list[int] | None) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    tensor = torch.randn(3, 4, 5, dtype=wide, generator=torch.Generator().manual_seed(0)).to(dtype)
    dims = (
        None if axes is None else {axis % 3 for axis in ([axes] if isinstance(axes, int) else axes)}
    )
    want = reference.clip_by_norm(tensor, 0.4, dims)
    clipped = clip_by_norm(tensor, 0.4, axes)
    assert clipped.dtype == dtype
    assert (clipped.abs() < tensor.abs()).any()
    torch.testing.assert_close(clipped, want.to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_tiny_and_huge_values(value: float) -> None:
    tensor = torch.full((50, 40), value)
    value = tensor[0, 0].item()  # the nearest float32
    norm = value * math.sqrt(2000)
    clipped, found = clip_by_global_norm([tensor], 0.5 * norm)
    torch.testing.assert_close(found.double(), torch.tensor(norm, dtype=torch.float64), **NORM)
    for got in (
        clipped[0],
        clip_by_norm(tensor, 0.5 * norm),
        clip_by_norm(tensor, 0.5 * norm, [0, 1]),
    ):
        torch.testing.assert_close(got, tensor / 2, **TOLERANCES[torch.float32])
    row = clip_by_norm(tensor, 0.5 * value * math.sqrt(40), axes=[1])
    torch.testing.assert_close(row, tensor / 2, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_element_spoils_what_shares_its_norm(value: float) -> None:
    tensor = torch.ones(3, 4)
    tensor[1, 2] = value
    clipped = clip_by_norm(tensor, 1.0, axes=[1])
    assert clipped[[0, 2]].eq(0.5).all()
    assert clipped[1, 2].isnan()
    assert clipped[1, 0].isnan() == math.isnan(value)
    for use_norm in (None, value, torch.tensor(value)):
        (clipped, other), norm = clip_by_global_norm([tensor, torch.ones(2)], 1.0, use_norm)
        assert not norm.isfinite()
        assert clipped.isnan().all()
        assert other.isnan().all()
    torch.testing.assert_close(
        clip_by_value(torch.tensor([value, -5.0]), -1.0, 2.0),
        torch.tensor([min(value, 2.0), -1.0]),
        equal_nan=True,
    )


BOUNDS: dict[str, tuple[Any, Any]] = {
    "two numbers": (-0.5, 0.25),
    "0-d tensors": (torch.tensor(-0.5), torch.tensor(0.25)),
    "0-d of other dtypes": (torch.tensor(-1), torch.tensor(0.25, dtype=torch.float64)),
    "one element": (torch.tensor([[-0.5]]), np.float32(0.25)),
    "a number and a tensor": (-0.5, torch.tensor([0.0, 0.5, 1.0, 2.0])),
    "a tensor and a number": (torch.tensor([0.0, -0.5, -1.0, -math.inf]), math.inf),
    "columns": (torch.tensor([[-0.1], [-0.2], [-0.3]]), torch.tensor([[0.1], [0.2], [0.3]])),
    "rows and columns": (torch.tensor([[-0.1], [-0.2], [-0.3]]), torch.tensor([0.0, 0.5, 1, 2])),
    "every element": (-torch.rand(3, 4), torch.rand(3, 4)),
    "in float64": (-torch.rand(3, 4).double(), torch.rand(3, 4).double()),
    "equal": (torch.full((3, 4), 0.2), torch.full((3, 4), 0.2)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BOUNDS)
def test_clip_by_value_between_bounds_of_any_shape(name: str, dtype: torch.dtype) -> None:
    low, high = BOUNDS[name]
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensor[1, 2] = math.nan
    before = tensor.clone()
    want = np.clip(tensor.double().numpy(), *(np.asarray(b, dtype=np.float64) for b in (low, high)))
    clipped = clip_by_value(tensor, low, high)
    assert (clipped != tensor).sum() > 1
    assert (clipped.dtype, clipped.shape) == (dtype, tensor.shape)
    torch.testing.assert_close(clipped, torch.tensor(want).to(dtype), equal_nan=True)
    torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)


NO_BOUNDS: dict[str, tuple[Any, Any, str]] = {
    "NaN": (torch.tensor([0.0, math.nan]), 1.0, "at most the upper one everywhere"),
    "NaN above": (0.0, torch.tensor([1.0, math.nan]), "at most the upper one everywhere"),
    "NaN number": (math.nan, 1.0, "at most the upper one"),
    "crossed once": (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), "at most the upper one"),
    "crossed in rows and columns": (
        torch.tensor([[0.0], [2.0]]),
        torch.tensor([3.0, 1.0]),
        "at most the upper one",
    ),
    "shape": (torch.zeros(3), 1.0, r"shape \[2, 2\] to a clip_value_min of shape \[3\]"),
    "larger": (0.0, torch.ones(5, 2, 2), r"clip_value_max of shape \[5, 2, 2\]"),
    "complex": (torch.zeros(2, dtype=torch.complex64), 1.0, "clip_value_min.*complex64"),
    "bool": (0.0, torch.tensor([True, True]), "clip_value_max.*bool"),
}


@pytest.mark.parametrize("name", NO_BOUNDS)
def test_what_are_no_bounds(name: str) -> None:
    low, high, message = NO_BOUNDS[name]
    with pytest.raises((TypeError, ValueError), match=f"cannot .*{message}.*Pass"):
        clip_by_value(torch.ones(2, 2), low, high)


def bounds_for_a_dtensor(device: str) -> None:
    on = mesh((2, 2), ("dp", "tp"), device)
    before = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    there = before.clone().to(device_of(device))
    given = distribute_tensor(there, on, (S0, S1), src_data_rank=None)
    low, high = torch.tensor(-0.2, device=there.device), torch.tensor([0.3], device=there.device)
    replicated = distribute_tensor(low.clone(), on, (R, R), src_data_rank=None)
    for lowest in (low, replicated, -0.2):
        clipped = clip_by_value(given, lowest, high)
        as_placed(clipped, given, before.double().clamp(low.item(), high.item()))
    with pytest.raises(ValueError, match=r"DTensor to a clip_value_max of shape \[3\]"):
        clip_by_value(given, -0.2, torch.ones(3, device=there.device))
    with pytest.raises(ValueError, match="at most the upper one"):
        clip_by_value(given, high, low)


def test_bounds_for_a_dtensor(four_ranks: Ranks) -> None:
    four_ranks.run(bounds_for_a_dtensor, four_ranks.device)


def test_nothing_to_clip() -> None:
    assert [x if x is None else x.item() for x in clip_by_global_norm([None], 1.0)[0]] == [None]
    assert clip_by_global_norm([], 1.0, use_norm=3.0) == ([], torch.tensor(3.0))
    assert clip_by_global_norm((t for t in [torch.zeros(0), torch.zeros(2)]), 0.0)[1].item() == 0.0
    assert clip_by_norm(torch.zeros(0, 3), 1.0, [0]).shape == (0, 3)
    assert torch.equal(clip_by_norm(torch.zeros(2, 3), 0.0, [0]), torch.zeros(2, 3))


def test_a_sparse_tensor_is_coalesced_and_scaled() -> None:
    tensor = torch.sparse_coo_tensor([[1, 1]], [1.5, 1.5], (3,), check_invariants=True)
    for clipped in (clip_by_norm(tensor, 1.0), clip_by_global_norm([tensor], 1.0)[0][0]):
        torch.testing.assert_close(clipped.to_dense(), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(tensor.to_dense(), torch.tensor([0.0, 3.0, 0.0]))


def test_a_parameter_comes_back_as_a_plain_copy() -> None:
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    for clipped in (
        clip_by_norm(param, 9.0),
        clip_by_norm(param, 9.0, 0),
        clip_by_value(param, -9.0, 9.0),
    ):
        assert not clipped.requires_grad
        assert clipped.data_ptr() != param.data_ptr()


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "clip_norm < 0": (lambda: clip_by_norm(torch.ones(2), -1.0), r"clip_norm=-1\.0"),
    "clip_norm NaN": (lambda: clip_by_global_norm([torch.ones(2)], math.nan), "clip_norm=nan"),
    "axis": (
        lambda: clip_by_norm(torch.ones(2, 3), 1.0, [0, 2]),
        r"axes=\[0, 2\].*\[2, 3\].*-2 to 1",
    ),
    "integers": (lambda: clip_by_norm(torch.arange(3), 1.0), r"torch\.int64"),
    "integers, axes": (lambda: clip_by_norm(torch.arange(3), 1.0, 0), r"torch\.int64"),
    "integers, global": (lambda: clip_by_global_norm([torch.arange(3)], 1.0), r"torch\.int64"),
    "bounds": (
        lambda: clip_by_value(torch.ones(2), 1.0, -1.0),
        r"\[1\.0, -1\.0\].*clip_value_min <= clip_value_max",
    ),
    "bound NaN": (lambda: clip_by_value(torch.ones(2), math.nan, 1.0), r"\[nan, 1\.0\]"),
    "sparse, axes": (
        lambda: clip_by_norm(torch.eye(2).to_sparse(), 1.0, 0),
        r"sparse_coo.*to_dense",
    ),
    "sparse, value": (
        lambda: clip_by_value(torch.eye(2).to_sparse(), 0.0, 1.0),
        r"sparse_coo.*to_dense",
    ),
    "complex": (
        lambda: clip_by_value(torch.ones(2) * 1j, -1.0, 1.0),
        "complex numbers have no order",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).split()) > 20  # attempted, found, why, what to do


def as_placed(
    clipped: Tensor, given: Tensor, want: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """`clipped` lies where `given` does, shares nothing with it, and is `want`."""
    assert isinstance(clipped, DTensor) == isinstance(given, DTensor)
    if isinstance(given, DTensor):
        assert isinstance(clipped, DTensor)
        assert clipped.placements == given.placements
        assert clipped.device_mesh == given.device_mesh
    assert clipped.shape == given.shape
    torch.testing.assert_close(whole(clipped), want.to(dtype), **TOLERANCES[dtype])


def every_function_on_every_layout(name: str, device: str) -> None:
    placed = LAYOUTS[name]
    wholes = random_wholes(placed, seed=3)
    grads = [param.grad for param in lay_out(wholes, placed, device)]
    total = reference.total_norm(wholes)
    clip_by_global_norm(grads, 1.0)  # compares copies, once
    with CommDebugMode() as comms:
        clipped, norm = clip_by_global_norm([None, *grads], 0.3 * total.item())
    assert comms.get_total_counts() == (0 if name in UNSHARDED else 1)
    assert clipped[0] is None
    assert same_bits_everywhere(norm)
    torch.testing.assert_close(norm.cpu().double(), total, **NORM)
    with CommDebugMode() as comms:
        known, _ = clip_by_global_norm(grads, 0.3 * total.item(), use_norm=norm)
    assert comms.get_total_counts() == 0
    wanted = reference.clip_norm(wholes, 0.3 * total.item())
    for grad, before, got, same, want in zip(
        grads, wholes, clipped[1:], known, wanted, strict=True
    ):
        as_placed(got, grad, want)
        as_placed(same, grad, want)
        as_placed(clip_by_norm(grad, 0.2), grad, reference.clip_by_norm(before, 0.2))
        as_placed(clip_by_value(grad, -0.1, 0.2), grad, before.double().clamp(-0.1, 0.2))
        for axes in [[0], [-1], [0, 1], []] if grad.ndim == 2 else []:
            as_placed(
                clip_by_norm(grad, 0.2, axes), grad, reference.clip_by_norm(before, 0.2, axes)
            )
        assert torch.equal(whole(grad), before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_function_on_every_layout(four_ranks: Ranks, name: str) -> None:
    four_ranks.run(every_function_on_every_layout, name, four_ranks.device)


# Placements on (2, 2), and over which dims a norm crosses how many mesh axes.
ACROSS: list[tuple[tuple, list[tuple[list[int], int]]]] = [
    ((S0, S1), [([0], 1), ([1], 1), ([2], 0), ([0, 1], 2), ([0, 1, 2], 2), ([], 0)]),
    ((S1, S1), [([0], 0), ([1], 2), ([0, 2], 0)]),
    ((R, S2), [([2], 1), ([-1, 0], 1), ([1], 0)]),
    ((S2, S0), [([2], 1), ([0], 1), ([1], 0), ([0, 2], 2)]),
    ((_StridedShard(0, split_factor=2), S0), [([0], 2), ([1], 0)]),
]


def norms_across_shards(
    placements: Sequence, cases: list[tuple[list[int], int]], device: str
) -> None:
    """Uneven shards: 5 rows, 3 columns and 7 further on 2 x 2 ranks."""
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
        on = mesh((2, 2), ("dp", "tp"), device)
        given = distribute_tensor(
            before.clone().to(device_of(device)), on, placements, src_data_rank=None
        )
        for axes, crossed in cases:
            want = reference.clip_by_norm(before, 0.4, axes)
            assert (want.abs() < before.abs()).any()
            with CommDebugMode() as comms:
                clipped = clip_by_norm(given, 0.4, axes)
            assert comms.get_total_counts() == crossed
            as_placed(clipped, given, want, dtype)


@pytest.mark.parametrize(
    ("placements", "cases"),
    [*ACROSS[:-1], pytest.param(*ACROSS[-1], marks=STRIDED_SHARD.skips)],
    ids=[str(placements) for placements, _ in ACROSS],
)
def test_norms_over_sharded_dims(
    four_ranks: Ranks, placements: tuple, cases: list[tuple[list[int], int]]
) -> None:
    four_ranks.run(norms_across_shards, placements, cases, four_ranks.device)


def partial_values_are_reduced_first(device: str) -> None:
    on = mesh((2, 2), ("dp", "tp"), device)
    parts = [torch.full((4, 2), float(rank + 1), device=device_of(device)) for rank in range(4)]
    rank = dist.get_rank()
    given = DTensor.from_local(parts[rank].clone(), on, (Partial(), S0), run_check=False)
    # Rows 0-3 lie on ranks 0 and 2, rows 4-7 on ranks 1 and 3.
    before = torch.cat([(parts[0] + parts[2]).cpu(), (parts[1] + parts[3]).cpu()])
    for clipped, want in (
        (clip_by_norm(given, 1.0), reference.clip_by_norm(before, 1.0)),
        (clip_by_norm(given, 1.0, [0]), reference.clip_by_norm(before, 1.0, [0])),
        (clip_by_norm(given, 1.0, [1]), reference.clip_by_norm(before, 1.0, [1])),
        (clip_by_global_norm([given], 1.0)[0][0], reference.clip_by_norm(before, 1.0)),
        (clip_by_value(given, -5.0, 5.0), before.clamp(-5.0, 5.0)),
    ):
        assert clipped.placements == (R, S0)
        torch.testing.assert_close(whole(clipped), want.float(), **TOLERANCES[torch.float32])
    assert torch.equal(given.to_local(), parts[rank])
    assert given.placements == (Partial(), S0)


def test_partial_values_are_reduced_first(four_ranks: Ranks) -> None:
    four_ranks.run(partial_values_are_reduced_first, four_ranks.device)


def one_shard_has_a_nan(device: str) -> None:
    placed = [Placed((6, 4), (S0, S1)), Placed((3,))]
    wholes = random_wholes(placed, seed=5)
    wholes[0][5, 3] = math.nan
    grads = [param.grad for param in lay_out(wholes, placed, device)]
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert norm.isnan()
    assert all(whole(t).isnan().all() for t in clipped)
    rows = whole(clip_by_norm(grads[0], 1.0, axes=[1]))
    assert rows.isnan().any(1).tolist() == [False] * 5 + [True]


def test_a_nan_on_one_rank_reaches_all(four_ranks: Ranks) -> None:
    four_ranks.run(one_shard_has_a_nan, four_ranks.device)
