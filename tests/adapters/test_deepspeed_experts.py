"""DeepSpeed engines with experts: each element counts once.

DeepSpeed's own norm averages those of experts, and is no oracle here.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.adapters.deepspeed import attach
from tests.support import engine_policies, engines
from tests.support.engine_policies import ADAGC, AGC, WITHOUT_UNITS, Case
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

WIDTH = 6
NUM_EXPERTS = 4
GROUP_SIZES = (2, 4)  # of each layer: over how many ranks the experts are spread


class Mixture(nn.Module):
    """Two layers of experts, spread over groups of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        engines.load()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(0)
        self.inner = nn.Linear(7, WIDTH)
        self.moes = nn.ModuleList(
            MoE(WIDTH, nn.Linear(WIDTH, WIDTH), NUM_EXPERTS, ep_size=size, use_rts=False)
            for size in GROUP_SIZES
        )
        self.outer = nn.Linear(WIDTH, 5)
        self.draw()

    def draw(self) -> None:
        """Weights of its own for every expert, the same on the ranks that hold it."""
        for index, moe in enumerate(self.moes):
            first = dist.get_rank() % moe.ep_size * moe.num_local_experts
            for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
                generator = torch.Generator().manual_seed(100 * index + first + local)
                for param in expert.parameters():
                    param.data = torch.randn(param.shape, generator=generator) / 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for moe in self.moes:
            x = x + moe(x)[0]
        return self.outer(x)


def expert_groups(model: nn.Module) -> Any:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    group = {"params": list(model.parameters()), "name": "all"}
    return split_params_into_different_moe_groups_for_optimizer(group)


def on_one_rank(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks, each once; experts by the index that one rank would give them."""
    found: dict[str, Tensor] = {}
    for rank, tensors in enumerate(engine_policies.of_all_ranks(mine)):
        for name, tensor in tensors.items():
            found.setdefault(_name_on_one_rank(name, rank), tensor)
    return found


def _name_on_one_rank(name: str, rank: int) -> str:
    layer, word, local = name.partition("deepspeed_experts.")
    if not word:
        return name
    index, _, rest = local.partition(".")
    size = GROUP_SIZES[int(layer.split(".")[1])]
    return f"{layer}{word}{rank % size * (NUM_EXPERTS // size) + int(index)}.{rest}"


def one_step(made: Any, dtype: str, case: Case) -> str:
    handle = attach(made, case.policy)
    with engines.collectives() as counts:
        step = Applied(made, 0, dtype)
    assert counts == [1]
    grads, weights, update = map(on_one_rank, (step.grads, step.weights, step.update))
    assert len(grads) == 4 + 2 + 2 * 2 * NUM_EXPERTS
    norm = handle.report.total_norm
    whole_norm = norm_of(grads, case.policy.norm_type)
    assert norm.item() == pytest.approx(whole_norm, rel=2e-7), case.policy
    assert same_bits_everywhere(norm)
    engine_policies.check(update, case.expected(grads, weights))
    state = str(handle.state_dict())
    if case is ADAGC:
        assert all(f"'{name}'" in state for name in grads)
    handle.detach()
    return state


def experts(stage: int, dtype: str) -> None:
    settings = config(stage, dtype)
    with warnings.catch_warnings(), engine(settings, Mixture(), groups=expert_groups) as made:
        warnings.simplefilter("ignore")
        states = [one_step(made, dtype, case) for case in (*WITHOUT_UNITS, AGC, ADAGC)]
        assert engine_policies.same_everywhere(states)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16")]
)
def test_experts_on_groups_of_two_sizes(four_engine_ranks: Ranks, stage: int, dtype: str) -> None:
    four_engine_ranks.run(experts, stage, dtype)
