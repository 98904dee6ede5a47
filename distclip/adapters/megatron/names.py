"""Names of parameters that are the same on every rank, and no two tensors share.

Megatron numbers the layers of each pipeline stage, and the experts of each rank, from zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from distclip.adapters.megatron.held_params import HeldParam
from distclip.adapters.megatron.rank_groups import RankGroups

_LAYER = re.compile(r"(?P<layers>.*?\blayers)\.\d+\b")
_EXPERT = re.compile(
    r"(?P<before>.*\blocal_experts\.)(?P<index>\d+)(?P<after>\..*)"  # SequentialMLP
    r"|(?P<before_te>.*\.linear_fc[12]\.(?:weight|bias))(?P<index_te>\d+)"  # TEGroupedMLP
)


def global_names(held: Sequence[HeldParam], chunks: Iterable[Any], groups: RankGroups) -> list[str]:
    """A name for each parameter: that of the whole model, or a position where it is unknown.

    Raises:
        ValueError: some of the parameters are not in the model.
    """
    local = _local_names(chunks)
    names = [local.get(one.param) for one in held]
    if local and None in names:
        raise ValueError(
            f"cannot find {names.count(None)} of the {len(names)} parameters of the optimizer in "
            f"the model: their names are unknown. Pass as `model=` all chunks that "
            f"`get_megatron_optimizer` got."
        )
    num_experts = _experts_per_rank(filter(None, names))
    return [
        _positioned(one, groups)
        if name is None
        else _with_global_expert(name, num_experts, groups)
        if one.is_expert
        else name
        for one, name in zip(held, names, strict=True)
    ]


def _local_names(chunks: Iterable[Any]) -> dict[Any, str]:
    """Names on this rank, with the numbers that layers have in the whole model."""
    names: dict[Any, str] = {}
    taken: set[str] = set()
    for index, chunk in enumerate(chunks):
        layers = {
            name: number - 1
            for name, module in chunk.named_modules()
            if isinstance(number := getattr(module, "layer_number", None), int)
        }
        for local, param in chunk.named_parameters():
            name = _with_global_layer(local, layers)
            while name.startswith("module."):
                name = name.removeprefix("module.")
            names[param] = f"{name}@chunk{index}" if name in taken else name
            taken.add(name)
    return names


def _with_global_layer(name: str, layers: dict[str, int]) -> str:
    """Args: layers: the number in the whole model of each layer of a chunk, by its local name."""
    found = _LAYER.match(name)
    # Layers of multi-token prediction are numbered by themselves, and lie on one stage.
    if found is None or found[0] not in layers or "mtp" in name:
        return name
    return f"{found['layers']}.{layers[found[0]]}{name[found.end() :]}"


def _experts_per_rank(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for found in filter(None, map(_EXPERT.fullmatch, names)):
        before, index, _ = _parts(found)
        counts[before] = max(counts.get(before, 0), index + 1)
    return counts


def _with_global_expert(name: str, num_experts: dict[str, int], groups: RankGroups) -> str:
    if groups.num_expert_ranks == 1:
        return name
    if (found := _EXPERT.fullmatch(name)) is None:
        return f"{name}@ep{groups.expert_rank}"
    before, index, after = _parts(found)
    return f"{before}{index + groups.expert_rank * num_experts[before]}{after}"


def _parts(found: re.Match[str]) -> tuple[str, int, str]:
    if found["index"] is not None:
        return found["before"], int(found["index"]), found["after"]
    return found["before_te"], int(found["index_te"]), ""


def _positioned(held: HeldParam, groups: RankGroups) -> str:
    """A position, with what distinguishes the ranks on which another tensor has it."""
    stage = f"@pp{groups.stage}" if groups.num_stages > 1 else ""
    is_other_expert = held.is_expert and groups.num_expert_ranks > 1
    expert = f"@ep{groups.expert_rank}" if is_other_expert else ""
    owner = ""
    if held.is_owned:
        ranks = groups.data_ranks(held.is_expert)
        owner = f"@dp{list(ranks).index(dist.get_rank())}"
    return f"{held.position}{stage}{expert}{owner}"
