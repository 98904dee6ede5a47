"""The process groups of Megatron: which ranks differ from this one, and in what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class RankGroups:
    """The groups of this rank.

    Attributes:
        tensor, expert_tensor: the ranks that split a tensor with this one, and an expert's.
        data, expert_data: the ranks with copies of whole tensors, and of the same experts.
        pipe, experts: of the ranks with other layers, and with other experts.
        data_group, expert_data_group: `data` and `expert_data` as process groups.
    """

    tensor: Sequence[int]
    expert_tensor: Sequence[int]
    data: Sequence[int]
    expert_data: Sequence[int]
    pipe: dist.ProcessGroup
    experts: dist.ProcessGroup
    data_group: dist.ProcessGroup
    expert_data_group: dist.ProcessGroup

    @classmethod
    def of(cls, optimizers: Iterable[Any]) -> RankGroups:
        """The groups of Megatron's parallel state.

        Raises:
            ValueError: there is none, or an optimizer was made with other groups.
        """
        state: Any = import_module("megatron.core.parallel_state")
        if not state.model_parallel_is_initialized():
            raise ValueError(
                "cannot attach to an optimizer of Megatron: its parallel state is not initialized, "
                "and only that says which ranks hold which parameters. Call "
                "`megatron.core.parallel_state.initialize_model_parallel(...)` first."
            )
        data = state.get_data_parallel_group(with_context_parallel=True)
        expert_data = state.get_expert_data_parallel_group()
        ranks = dist.get_process_group_ranks
        groups = cls(
            ranks(state.get_tensor_model_parallel_group()),
            ranks(state.get_expert_tensor_parallel_group()),
            ranks(data),
            ranks(expert_data),
            state.get_pipeline_model_parallel_group(),
            state.get_expert_model_parallel_group(),
            data,
            expert_data,
        )
        for optimizer in optimizers:
            given = getattr(optimizer, "tp_group", None)
            if given is not None and ranks(given) != groups.tensor:
                raise ValueError(
                    f"cannot attach to this {type(optimizer).__name__}: it splits tensors among "
                    f"the ranks {ranks(given)}, but Megatron's parallel state among "
                    f"{groups.tensor}: its groups were passed by hand, and which ranks hold which "
                    f"parameters is unknown. Use the groups of `initialize_model_parallel`."
                )
        return groups

    def tensor_ranks(self, is_expert: bool) -> Sequence[int]:
        return self.expert_tensor if is_expert else self.tensor

    def data_ranks(self, is_expert: bool) -> Sequence[int]:
        return self.expert_data if is_expert else self.data

    @property
    def stage(self) -> int:
        return dist.get_rank(self.pipe)

    @property
    def num_stages(self) -> int:
        return dist.get_world_size(self.pipe)

    @property
    def expert_rank(self) -> int:
        return dist.get_rank(self.experts)

    @property
    def num_expert_ranks(self) -> int:
        return dist.get_world_size(self.experts)
