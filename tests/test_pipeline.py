"""Pipeline stages clip as the whole model in one process does."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.parallel_models import (
    Model,
    check_clip,
    dense_blocks,
    fully_sharded,
    loss_of,
    make_model,
    stage_of,
    tensor_parallel,
    tokens_and_targets,
    whole_gradients,
)
from tests.ranks import Ranks, mesh
from tests.wrapped import local

MICROBATCHES = 4


def backward(parts: dict[int, nn.Module], num_stages: int, pp: DeviceMesh, data: tuple[Tensor, Tensor]) -> None:
    """One step of a real schedule: 1F1B for one stage a rank, interleaved 1F1B for several."""
    stages = [PipelineStage(p, i, num_stages, torch.device("cpu"), group=pp.get_group()) for i, p in parts.items()]
    if len(stages) == 1:
        schedule = Schedule1F1B(stages[0], MICROBATCHES, loss_of)
    else:
        schedule = ScheduleInterleaved1F1B(stages, MICROBATCHES, loss_of)
    tokens, targets = data
    schedule.step(*([tokens] if 0 in parts else []), target=targets if num_stages - 1 in parts else None)


def own_stages(num_stages: int, pp: DeviceMesh) -> list[int]:
    return list(range(pp.get_local_rank(), num_stages, pp.size()))


def named(parts: dict[int, nn.Module]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p for part in parts.values() for name, p in part.named_parameters()}


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
    for norm_type in (2.0, 1.0, 8.0, torch.inf):
        check_clip(params, wholes, norm_type)


def test_a_pipeline_of_dtensors(eight_ranks: Ranks) -> None:
    eight_ranks.run(dtensors_find_the_pipeline_axis, 2)


def test_an_interleaved_pipeline_of_dtensors(eight_ranks: Ranks) -> None:
    eight_ranks.run(dtensors_find_the_pipeline_axis, 4)
