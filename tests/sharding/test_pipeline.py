"""Pipeline stages clip as the whole model in one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.support.parallel_models import (
    Model,
    check_clip,
    dense_blocks,
    fully_sharded,
    loss_of,
    make_model,
    stage_of,
    tensor_parallel,
    tokens_and_targets,
    verify,
    whole_gradients,
)
from tests.support.ranks import Ranks, mesh
from tests.support.torch_versions import PIPELINE_OVER_GLOO, TORCH
from tests.support.wrapped import local

pytestmark = PIPELINE_OVER_GLOO.skips
MICROBATCHES = 4


def backward(
    parts: dict[int, nn.Module], num_stages: int, pp: DeviceMesh, data: tuple[Tensor, Tensor]
) -> None:
    """One step of a real schedule: 1F1B for one stage per rank, interleaved 1F1B for several."""
    stages = [
        PipelineStage(p, i, num_stages, torch.device("cpu"), group=pp.get_group())
        for i, p in parts.items()
    ]
    if len(stages) == 1:
        schedule = Schedule1F1B(stages[0], MICROBATCHES, loss_of)
    else:
        schedule = ScheduleInterleaved1F1B(stages, MICROBATCHES, loss_of)
    tokens, targets = data
    schedule.step(
        *([tokens] if 0 in parts else []), target=targets if num_stages - 1 in parts else None
    )


def own_stages(num_stages: int, pp: DeviceMesh) -> list[int]:
    return list(range(pp.get_local_rank(), num_stages, pp.size()))


def named(parts: dict[int, nn.Module]) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p
        for part in parts.values()
        for name, p in part.named_parameters()
    }


def three_axes() -> DeviceMesh:
    return mesh((2, 2, 2), ("pp", "fsdp", "tp"))


def sharded_stages(model: Model, num_stages: int) -> dict[int, nn.Module]:
    """This rank's stages, FSDP2 x TP, after a step."""
    root = three_axes()
    parts = {i: stage_of(model, i, num_stages) for i in own_stages(num_stages, root["pp"])}
    for part in parts.values():
        fully_sharded(tensor_parallel(part, root["tp"]), root["fsdp"], reshard_after_forward=False)
    backward(parts, num_stages, root["pp"], tokens_and_targets(2, root["fsdp"].get_local_rank()))
    return parts


def dtensors_find_the_pipeline_axis(num_stages: int) -> None:
    model = make_model(dense_blocks)
    params = named(sharded_stages(model, num_stages))
    wholes = whole_gradients(model)
    assert all(p.grad is not None for p in params.values())
    verify(params)
    for norm_type in (2.0, 1.0, 8.0, torch.inf):
        check_clip(params, wholes, norm_type)


def test_a_pipeline_of_dtensors(eight_ranks: Ranks) -> None:
    eight_ranks.run(dtensors_find_the_pipeline_axis, 2)


def test_an_interleaved_pipeline_of_dtensors(eight_ranks: Ranks) -> None:
    eight_ranks.run(dtensors_find_the_pipeline_axis, 4)


def frozen_last_stage() -> None:
    model = make_model(dense_blocks)
    for frozen in (model.blocks["2"], model.blocks["3"], model.head):
        frozen.requires_grad_(False)
    params = named(sharded_stages(model, 2))
    first = three_axes()["pp"].get_local_rank() == 0
    assert {p.grad is None for p in params.values()} == {not first}
    check_clip(params, whole_gradients(model))


@pytest.mark.skipif(
    TORCH == (2, 10), reason="torch 2.10 leaves gradients on a stage whose parameters are frozen"
)
def test_a_stage_without_gradients_takes_part(eight_ranks: Ranks) -> None:
    eight_ranks.run(frozen_last_stage)


def plain_stages(model: Model) -> tuple[dict[str, Tensor], DeviceMesh]:
    """The parameters of this rank's stage under DDP, after a step; and the mesh of all ranks."""
    root = mesh((4, 2), ("pp", "dp"))
    index = root["pp"].get_local_rank()
    parts = {
        index: DistributedDataParallel(
            stage_of(model, index, 4), process_group=root["dp"].get_group()
        )
    }
    backward(parts, 4, root["pp"], tokens_and_targets(2, root["dp"].get_local_rank()))
    return named(parts), root


def plain_tensors_on_the_mesh_given() -> None:
    model = make_model(dense_blocks)
    params, root = plain_stages(model)
    wholes = whole_gradients(model)
    verify(params, mesh=root)
    for norm_type in (2.0, 1.0, 8.0, torch.inf):
        check_clip(params, wholes, norm_type, mesh=root)
    norm = distclip.get_total_norm([p.grad for p in params.values()], mesh=root)
    expected = distclip.get_total_norm(list(wholes.values()))
    assert expected.dtype is torch.float64
    assert norm.dtype is torch.float32  # other stages may hold any
    torch.testing.assert_close(norm.double(), expected, rtol=1e-7, atol=0)
    assert norm > 1.1 * distclip.get_total_norm(
        [p.grad for p in params.values()]
    )  # each stage adds to it


def test_a_pipeline_of_plain_tensors(eight_ranks: Ranks) -> None:
    eight_ranks.run(plain_tensors_on_the_mesh_given)


TIED = {"embed.weight", "head.weight"}


def tied_over_pp(name: str, param: Tensor) -> distclip.Layout | None:
    return distclip.Layout(replicated=frozenset({"pp"})) if name in TIED else None


def add_tied_gradients(params: dict[str, Tensor], whole: Tensor, pp: DeviceMesh) -> None:
    """As Megatron does: both stages get the sum of their gradients. The other stages add zeros."""
    tied = [local(p.grad) for name, p in params.items() if name in TIED]
    dist.all_reduce(tied[0] if tied else torch.zeros_like(whole), group=pp.get_group())


def tied_embedding_counts_once(as_dtensors: bool) -> None:
    model = make_model(dense_blocks, tied=True)
    if as_dtensors:
        params, root, where = named(sharded_stages(model, 4)), three_axes(), {}
    else:
        params, root = plain_stages(model)
        where = {"mesh": root}
    wholes = whole_gradients(model)
    assert TIED & set(wholes) == {"embed.weight"}
    add_tied_gradients(params, wholes["embed.weight"], root["pp"])
    tied = {name.replace("head", "embed"): p for name, p in params.items()}
    verify(tied, layouts=tied_over_pp, **where)
    for norm_type in (2.0, 1.0):
        check_clip(tied, wholes, norm_type, layouts=tied_over_pp, **where)


def test_a_tied_embedding_of_plain_tensors_counts_once(eight_ranks: Ranks) -> None:
    eight_ranks.run(tied_embedding_counts_once, False)


def test_a_tied_embedding_of_dtensors_counts_once(eight_ranks: Ranks) -> None:
    eight_ranks.run(tied_embedding_counts_once, True)
