"""DeepSpeed engines with pipeline stages and a tied weight: each element counts once."""

from __future__ import annotations

import importlib.util
import warnings
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distclip.adapters.deepspeed import attach
from tests.support import engine_policies, engines
from tests.support.engine_policies import ADAGC, AGC, WITHOUT_UNITS, Case
from tests.support.engines import config, engine, norm_of
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

WIDTH, HIDDEN = 6, 10
NUM_MICRO = 2
TIED = "tied_modules.embed.weight"


class Embed(nn.Linear):
    """Tied: the first layer multiplies by the weight, the last by its transpose."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HIDDEN, bias=False)


def unembed(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight.t())


def fill(model: nn.Module) -> None:
    """Weights that depend on the name and nothing else."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        param.data = torch.randn(param.shape, generator=generator) / 3


class OneProcess(nn.Module):
    """What the pipeline computes, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embed": Embed()})
        for index in range(1, 4):
            self.add_module(str(index), nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied_modules["embed"](x)
        for index in range(1, 4):
            x = self.get_submodule(str(index))(x)
        return unembed(self.tied_modules["embed"], x)


def batch(data_rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * data_rank + micro)
    return torch.randn(4, WIDTH, generator=generator), torch.randn(4, WIDTH, generator=generator)


def two_stages() -> Any:
    engines.load()
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    layers = [
        TiedLayerSpec("embed", Embed),
        *(LayerSpec(nn.Linear, HIDDEN, HIDDEN) for _ in range(3)),
        TiedLayerSpec("embed", Embed, forward_fn=unembed),
    ]
    model = PipelineModule(
        layers=layers, num_stages=2, loss_fn=F.mse_loss, partition_method="uniform"
    )
    fill(model)
    return model


def gradients_of_one_process(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model = OneProcess().double()
    model.load_state_dict(weights)
    for data_rank in range(2):
        for micro in range(NUM_MICRO):
            inputs, targets = (t.double() for t in batch(data_rank, micro))
            (F.mse_loss(model(inputs), targets) / (2 * NUM_MICRO)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def weights_of_all_stages(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for found in engine_policies.of_all_ranks(mine) for n, t in found.items()}


def one_step(made: Any, dtype: str, case: Case) -> str:
    handle = attach(made, case.policy)
    mine = engines.masters(made)
    weights = weights_of_all_stages(mine)
    grads = gradients_of_one_process(weights)
    data_rank = made.grid.get_data_parallel_rank()
    kind = engines.DTYPES[dtype]
    batches = [tuple(t.to(kind) for t in batch(data_rank, micro)) for micro in range(NUM_MICRO)]
    with engines.collectives() as counts:
        made.train_batch(data_iter=iter(batches))
    assert counts == [1]
    norm, is_exact = handle.report.total_norm, dtype == "fp32"
    assert same_bits_everywhere(norm)
    whole_norm = norm_of(grads, case.policy.norm_type)
    assert norm.item() == pytest.approx(whole_norm, rel=1e-6 if is_exact else 2e-2)
    update, expected = engines.updates(made, mine), case.expected(grads, weights)
    if is_exact:
        engine_policies.check(update, expected)
    copies = [found[TIED] for found in engine_policies.of_all_ranks(update)]
    assert all(torch.equal(copy, copies[0]) for copy in copies)  # tied weights stay alike
    state = str(handle.state_dict())
    handle.detach()
    return state


def pipeline(stage: int, dtype: str) -> None:
    more = {"data_types": {"grad_accum_dtype": "fp32"}} if dtype == "bf16" else {}
    settings = config(stage, dtype, NUM_MICRO, **more)
    with (
        warnings.catch_warnings(),
        engine(settings, two_stages(), groups=lambda m: m.parameters()) as made,
    ):
        warnings.simplefilter("ignore")
        states = [one_step(made, dtype, case) for case in (*WITHOUT_UNITS, AGC, ADAGC)]
        assert engine_policies.same_everywhere(states)
        # All ranks remember the tensors of all stages.
        assert all(f"'{name}'" in states[-1] for name, _ in OneProcess().named_parameters())


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_pipeline_stages_with_tied_weights(
    four_engine_ranks: Ranks, stage: int, dtype: str
) -> None:
    four_engine_ranks.run(pipeline, stage, dtype)


def tied_weights_without_a_mark() -> None:
    """DeepSpeed marks the copies that do not count. A copy without the mark would count twice."""
    model = two_stages()
    with (
        warnings.catch_warnings(),
        engine(config(1, gas=NUM_MICRO), model, groups=lambda m: m.parameters()) as made,
    ):
        warnings.simplefilter("ignore")
        for param in model.tied_modules.parameters():
            del param.ds_pipe_replicated
        with pytest.raises(AttributeError, match="ds_pipe_replicated"):
            attach(made)


def test_tied_weights_without_deepspeeds_mark_are_an_error(four_engine_ranks: Ranks) -> None:
    four_engine_ranks.run(tied_weights_without_a_mark)
