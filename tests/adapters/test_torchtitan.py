"""torchtitan's own clip call, replaced by one line: the same norm on its meshes.

And an answer where torchtitan has none.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import LayoutError
from tests.support import reference
from tests.support.ranks import Ranks, device_of, mesh, same_bits_everywhere
from tests.support.tolerances import NORM
from tests.support.wrapped import local

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan is not installed (tests/peers.txt)",
)

R, S0, S1 = Replicate(), Shard(0), Shard(1)
DENSE = {"dp_replicate": R, "dp_shard": S0, "cp": S0, "tp": S1}
EXPERTS = {"dp_replicate": R, "efsdp": S1, "ep": S0}

# What torchtitan's command line would give for four ranks.
DEGREES: dict[str, dict[str, int]] = {
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "fsdp x tp": {"dp_shard": 2, "tp": 2},
    "fsdp x cp": {"dp_shard": 2, "cp": 2},
    "pp x fsdp": {"pp": 2, "dp_shard": 2},
    "pp x tp": {"pp": 2, "tp": 2},
    "fsdp x ep": {"dp_shard": 4, "ep": 2},
    "hsdp x ep": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    "pp x fsdp x ep": {"pp": 2, "dp_shard": 2, "ep": 2},
}


@functools.cache
def dims_of(kind: str, device: str) -> Any:
    """torchtitan's meshes, all unflattened from one axis, `world`.

    Axes of one rank have a fake backend.
    """
    from torchtitan.distributed import parallel_dims

    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
    degrees = dict.fromkeys(axes, 1) | DEGREES[kind]
    with mock.patch.object(parallel_dims, "device_type", device):
        dims = parallel_dims.ParallelDims(**degrees, world_size=4)
        dims.build_mesh()
    return dims


def placed(
    wholes: Sequence[Tensor], on: DeviceMesh, kinds: dict[str, Placement]
) -> list[nn.Parameter]:
    placements = [kinds[axis] for axis in on.mesh_dim_names or ()]
    params = []
    for whole in wholes:
        # A clone, because a Replicate DTensor may share the memory of its source.
        local_copy = whole.clone().to(device_of(on.device_type))
        grad = distribute_tensor(local_copy, on, placements, src_data_rank=None)
        params.append(nn.Parameter(torch.zeros_like(grad)))
        params[-1].grad = grad.clone()
    return params


def stage_wholes(stage: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The dense tensors and the experts of one stage."""
    generator = torch.Generator().manual_seed(100 * seed + stage)
    return (
        [torch.randn(shape, generator=generator) for shape in ((8, 6), (5, 4), (1, 2))],
        [torch.randn(shape, generator=generator) for shape in ((4, 6, 3), (4, 3, 2))],
    )


def parameters(kind: str, device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    """This rank's parameters, and the whole gradients of all stages."""
    dims = dims_of(kind, device)
    stage = dims.get_mesh("pp").get_local_rank() if dims.pp > 1 else 0
    dense, experts = stage_wholes(stage, seed=7)
    params = placed(dense, dims.get_activated_mesh(list(DENSE)), DENSE)
    if dims.ep > 1:
        params += placed(experts, dims.get_activated_mesh(list(EXPERTS)), EXPERTS)
    wholes: list[Tensor] = []
    for other in range(dims.pp):
        dense, experts = stage_wholes(other, seed=7)
        wholes += dense + experts if dims.ep > 1 else dense
    return params, wholes


def same_as_torchtitan(device: str) -> None:
    from torchtitan.distributed.utils import clip_grad_norm_

    for kind in DEGREES:
        dims = dims_of(kind, device)
        for p in (2.0, 1.0):  # torchtitan hangs on p = inf where a shard is empty
            (ours, wholes), (theirs, _) = parameters(kind, device), parameters(kind, device)
            expected = reference.total_norm(wholes, p)
            max_norm = 0.3 * expected.item()
            their_norm = clip_grad_norm_(
                theirs,
                max_norm,
                p,
                foreach=True,
                pp_mesh=dims.get_optional_mesh("pp"),
                ep_enabled=dims.ep_enabled,
            )
            # The one line. Nothing on a stage's tensors shows the other stages: the axis of their
            # root mesh is `world`.
            on = dims.get_activated_mesh(["pp", *DENSE]) if dims.pp > 1 else None
            with CommDebugMode() as comms:
                norm = distclip.clip_grad_norm_(ours, max_norm, p, foreach=True, mesh=on)

            assert comms.get_total_counts() == 1, kind
            torch.testing.assert_close(norm.cpu().double(), expected, **NORM)
            torch.testing.assert_close(their_norm, norm, rtol=1e-6, atol=0)
            assert same_bits_everywhere(norm)
            assert max_norm / norm.item() < 0.31  # it did clip
            for mine, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(local(mine.grad), local(their.grad), rtol=1e-6, atol=0)


def test_the_norm_is_torchtitans_on_its_meshes(four_ranks: Ranks) -> None:
    four_ranks.run(same_as_torchtitan, four_ranks.device)


def stages_ask_for_the_mesh(device: str) -> None:
    for kind in ("pp x fsdp", "pp x tp", "pp x fsdp x ep"):
        params, _ = parameters(kind, device)
        before = [local(p.grad).clone() for p in params]
        with pytest.raises(
            LayoutError, match=r"lies on 2 of the 4 ranks .*\['world'\].*Pass `mesh=`"
        ):
            distclip.clip_grad_norm_(params, 0.1)
        assert all(torch.equal(local(p.grad), was) for p, was in zip(params, before, strict=True))


def test_pipeline_stages_ask_for_the_mesh(four_ranks: Ranks) -> None:
    four_ranks.run(stages_ask_for_the_mesh, four_ranks.device)


def beside_plain(device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    params, wholes = parameters("fsdp x ep", device)
    plain = nn.Parameter(torch.zeros(3, device=device_of(device)))
    plain.grad = torch.arange(1.0, 4.0, device=device_of(device))
    return [*params, plain], [*wholes, torch.arange(1.0, 4.0)]


def not_all_on_tp(device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    params, wholes = parameters("fsdp x tp", device)
    dense = dims_of("fsdp x tp", device).get_activated_mesh(list(DENSE))
    extra = torch.arange(1.0, 13.0).view(4, 3)
    return [*params, *placed([extra], dense["dp_shard"], DENSE)], [*wholes, extra]


def experts_under_another_name(device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    dense, experts = stage_wholes(0, seed=3)
    on = mesh((2, 2), ("efsdp", "experts"), device)
    params = placed(dense, dims_of("fsdp", device).get_activated_mesh(list(DENSE)), DENSE)
    return [*params, *placed(experts, on, {"efsdp": S1, "experts": S0})], [*dense, *experts]


def torchtitan_has_no_answer(device: str) -> None:
    from torchtitan.distributed.utils import clip_grad_norm_

    for make, with_experts, error in (
        (beside_plain, True, AssertionError),
        (beside_plain, False, RuntimeError),
        (not_all_on_tp, False, RuntimeError),
        (experts_under_another_name, True, RuntimeError),
    ):
        with pytest.raises(error):
            clip_grad_norm_(make(device)[0], 0.1, foreach=True, ep_enabled=with_experts)
        params, wholes = make(device)
        before = [local(p.grad).clone() for p in params]
        expected = reference.total_norm(wholes)
        norm = distclip.clip_grad_norm_(params, 0.1)
        torch.testing.assert_close(norm.cpu().double(), expected, **NORM)
        assert same_bits_everywhere(norm)
        assert norm > 1  # it did clip
        for param, was in zip(params, before, strict=True):
            torch.testing.assert_close(
                local(param.grad), was * (0.1 / (norm.item() + 1e-6)), rtol=3e-7, atol=0
            )
        dist.barrier()


def test_an_answer_where_torchtitan_has_none(four_ranks: Ranks) -> None:
    four_ranks.run(torchtitan_has_no_answer, four_ranks.device)
