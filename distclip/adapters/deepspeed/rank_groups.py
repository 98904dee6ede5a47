"""The process groups of a DeepSpeed engine: which ranks differ from this one, and in what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class RankGroups:
    """The groups of this rank.

    Attributes:
        tensor: the ranks that split tensors with this one.
        pipe: of the ranks with other layers; None where there is one stage.
        data: the ranks with copies of whole parameters.
        experts, expert_data: by the name of a group of experts, the ranks with other experts, and
            those with copies of the same.
    """

    tensor: Sequence[int]
    pipe: dist.ProcessGroup | None
    data: Sequence[int]
    experts: dict[str, Sequence[int]]
    expert_data: dict[str, Sequence[int]]

    @classmethod
    def of(cls, engine: Any) -> RankGroups:
        pipe = _group_of(engine.mpu, "get_pipeline_model_parallel_group", "get_pipe_parallel_group")
        tensor = _group_of(
            engine.mpu,
            "get_tensor_model_parallel_group",
            "get_slice_parallel_group",
            "get_model_parallel_group",
        )
        ranks = dist.get_process_group_ranks
        return cls(
            [dist.get_rank()] if tensor is None else ranks(tensor),
            pipe if pipe is not None and len(ranks(pipe)) > 1 else None,
            ranks(engine.seq_data_parallel_group),
            _ranks_by_name(engine.expert_parallel_group),
            _ranks_by_name(engine.expert_data_parallel_group),
        )

    @property
    def are_copies(self) -> bool:
        """Whether the ranks differ in nothing but their data."""
        experts = any(len(ranks) > 1 for ranks in self.experts.values())
        return len(self.tensor) == 1 and self.pipe is None and not experts


def _group_of(mpu: Any, *methods: str) -> Any:
    """What the first of these methods returns that the model parallel unit has.

    Newer Megatrons, DeepSpeed's own grid and older Megatrons name them differently.
    """
    return next((getattr(mpu, name)() for name in methods if hasattr(mpu, name)), None)


def _ranks_by_name(groups: dict[str, Any] | None) -> dict[str, Sequence[int]]:
    return {name: dist.get_process_group_ranks(group) for name, group in (groups or {}).items()}
