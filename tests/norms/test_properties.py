"""hypothesis draws shapes, meshes and placements: the result never depends on the layout."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

import distclip
from tests.support import reference
from tests.support.layouts import Placed, lay_out, random_wholes, whole
from tests.support.ranks import Ranks
from tests.support.tolerances import NORM, TOLERANCES

MESHES = [
    ((4,), ("fsdp",)),
    ((2, 2), ("dp", "tp")),
    ((2, 2), ("efsdp", "ep")),
    ((1, 4), ("one", "four")),
]
SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@st.composite
def placed_tensors(draw: st.DrawFn) -> Placed:
    shape = draw(SHAPES)
    if not draw(st.booleans()):
        return Placed(shape)
    sizes, axes = draw(st.sampled_from(MESHES))
    kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    return Placed(shape, tuple(draw(st.sampled_from(kinds)) for _ in sizes), sizes, axes)


def as_the_reference(placed: list[Placed], norm_type: float, seed: int) -> None:
    wholes = random_wholes(placed, seed)
    expected = reference.total_norm(wholes, norm_type)
    max_norm = 0.7 * expected.item()
    params = lay_out(wholes, placed)
    norm = distclip.clip_grad_norm_(params, max_norm, norm_type)
    torch.testing.assert_close(norm.double(), expected, **NORM)
    for param, want in zip(
        params, reference.clip_norm(wholes, max_norm, norm_type, eps=1e-6), strict=True
    ):
        torch.testing.assert_close(whole(param.grad), want.float(), **TOLERANCES[torch.float32])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    placed=st.lists(placed_tensors(), min_size=1, max_size=5),
    norm_type=st.sampled_from([0.7, 1.0, 2.0, 5.0, 9.0, float("inf")]),
    seed=st.integers(0, 1000),
)
def test_the_result_never_depends_on_the_layout(
    four_on_cpus: Ranks, placed: list[Placed], norm_type: float, seed: int
) -> None:
    four_on_cpus.run(as_the_reference, placed, norm_type, seed)
