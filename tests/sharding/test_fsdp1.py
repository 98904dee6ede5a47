"""FSDP1: tied weights, and the private names of torch without which a norm would be wrong."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, _common_utils

import distclip
from distclip.sharding.fsdp1 import any_flattened
from distclip.sharding.local_tensors import layout_cache_key
from distclip.sharding.read import read_layouts
from tests.support import reference
from tests.support.ranks import Ranks, device_of, mesh
from tests.support.wrapped import with_gradients

CALLS = {
    "Clipper": distclip.Clipper,
    "clip_grad_norm_": lambda params: distclip.clip_grad_norm_(params, 1.0),
    "get_total_norm": lambda params: distclip.get_total_norm([p.grad for p in params]),
}


def parameter() -> nn.Parameter:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    return param


@pytest.mark.parametrize("call", CALLS)
def test_a_torch_without_the_mark_of_flattened_parameters_is_refused(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.delattr(_common_utils, "FSDP_FLATTENED")
    with pytest.raises(ImportError, match=r"has no `FSDP_FLATTENED`.*tested with torch 2\.13"):
        CALLS[call]([parameter()])


@pytest.mark.parametrize("missing", ["the module", "the class"])
def test_without_fsdp1_there_is_nothing_to_refuse(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delattr(_common_utils, "FSDP_FLATTENED")
    if missing == "the module":
        monkeypatch.delitem(sys.modules, "torch.distributed.fsdp")
    else:
        monkeypatch.delattr(torch.distributed.fsdp, "FullyShardedDataParallel")
    assert distclip.clip_grad_norm_([param := parameter()], 1.0) == 5
    assert param.grad.norm() < 1.01  # it did clip


def test_the_mark_is_the_one_that_torch_sets() -> None:
    param = parameter()
    assert not any_flattened([parameter(), param])
    _common_utils._set_fsdp_flattened(param)
    assert any_flattened([parameter(), param])
    assert layout_cache_key([param]) is None
    assert layout_cache_key([parameter()]) is not None


def without_a_group_across_replicas(strategy: str, device: str) -> None:
    def wrap() -> FullyShardedDataParallel:
        replicas = mesh((2, 2), ("replicate", "shard"), device) if "HYBRID" in strategy else None
        return FullyShardedDataParallel(
            nn.Linear(3, 5),
            sharding_strategy=ShardingStrategy[strategy],
            device_mesh=replicas,
            device_id=device_of(device),
        )

    distclip.Clipper(wrap())
    model = wrap()
    if "HYBRID" not in strategy:
        assert "_inter_node_pg" not in vars(model)
        return
    del model._inter_node_pg
    with pytest.raises(RuntimeError, match=r"has no `_inter_node_pg`.*tested with torch 2\.13"):
        distclip.Clipper(model)


@pytest.mark.parametrize(
    "strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]
)
def test_a_hybrid_unit_without_a_group_across_replicas_is_refused(
    four_ranks: Ranks, strategy: str
) -> None:
    four_ranks.run(without_a_group_across_replicas, strategy, four_ranks.device)


class Tied(nn.Module):
    """An embedding whose weight is the head's too, of a size that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(tokens)))


def tied_model(device: str) -> Tied:
    torch.manual_seed(0)
    return Tied().to(device_of(device))


def run_backward(model: nn.Module, device: str) -> None:
    tokens = torch.arange(7, device=device_of(device)).view(1, 7)
    (30 * model(tokens).square().mean()).backward()


def tied_weight_is_one_tensor(original: bool, device: str) -> None:
    whole = tied_model(device)
    run_backward(whole, device)
    wholes = {name: p.grad.cpu() for name, p in whole.named_parameters()}
    model = FullyShardedDataParallel(
        tied_model(device), use_orig_params=original, device_id=device_of(device)
    )
    run_backward(model, device)
    clipper = distclip.Clipper(model, distclip.ClipTensorNorm(1.0))
    shards = [shard for param in clipper.plan.params for shard in param.shards]
    assert [shard.name for shard in shards] == list(wholes)
    assert [shard.numel for shard in shards] == [whole.numel() for whole in wholes.values()]
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    clipper.clip_()
    for param, grad in zip(clipper.plan.params, before, strict=True):
        for shard in param.shards if grad is not None else ():
            norm = reference.total_norm([wholes[shard.name]]).item()
            assert norm > 2  # it did clip
            here = slice(shard.shard.offset, shard.shard.offset + shard.shard.numel)
            after, want = param.param.grad.view(-1)[here], grad.view(-1)[here] / norm
            torch.testing.assert_close(after, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_a_tied_weight_is_one_tensor(four_ranks: Ranks, original: bool) -> None:
    four_ranks.run(tied_weight_is_one_tensor, original, four_ranks.device)


def layouts_by_strategy(device: str) -> None:
    for kind, layout in {
        "fsdp1 FULL_SHARD original": "sharded over fsdp",
        "fsdp1 HYBRID_SHARD flat": "sharded over fsdp; copies over fsdp_replicate",
        "fsdp1 NO_SHARD original": "copies over fsdp",
    }.items():
        model = with_gradients(kind, device)
        named = list(model.named_parameters())
        read = read_layouts(named, [model])
        assert {str(param.layout) for param in read.params} == {layout}
        assert (read.reduce_mesh is None) == ("NO_SHARD" in kind)


def test_layouts_by_strategy(four_ranks: Ranks) -> None:
    four_ranks.run(layouts_by_strategy, four_ranks.device)


def unit_of_a_model() -> None:
    """As FSDP1's own method, which refuses it in these words, and with a RuntimeError."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    model[1] = FullyShardedDataParallel(model[1], device_id=torch.device("cpu"))
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    model(torch.ones(2, 3)).sum().backward()
    unit = model.module[1]
    before = [p.grad.clone() for p in model.parameters()]
    for error in (RuntimeError, distclip.LayoutError):
        for call in (unit.clip_grad_norm_, lambda limit: distclip.clip_grad_norm_(unit, limit)):
            with pytest.raises(
                RuntimeError if call == unit.clip_grad_norm_ else error,
                match=r"`clip_grad_norm_\(\)` should only be called on the root FSDP instance",
            ):
                call(1e-3)
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))
    distclip.clip_grad_norm_(model, 1e-3)
    assert not any(map(torch.equal, before, [p.grad for p in model.parameters()]))
    distclip.Clipper([{"params": unit, "name": "unit"}]).clip_()  # a group of its own is meant


def test_a_unit_of_a_model_is_refused(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(unit_of_a_model)


def axis_with_the_name_of_another() -> None:
    """FSDP1 has no names for its axes; distclip's must not hide one of the mesh."""
    root = mesh((2, 2), ("fsdp", "other"))
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        nn.Linear(3, 5),
        process_group=root["other"].get_group(),
        device_id=torch.device("cpu"),
    )
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    norm = distclip.clip_grad_norm_(model, 1.0, mesh=root)
    torch.testing.assert_close(norm, torch.tensor(20.0).sqrt())


def test_an_axis_of_the_mesh_may_have_the_name_fsdp(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(axis_with_the_name_of_another)


def listed_parameters_with_their_module(original: bool, device: str) -> None:
    whole = tied_model(device)
    run_backward(whole, device)
    model = FullyShardedDataParallel(
        tied_model(device), use_orig_params=original, device_id=device_of(device)
    )
    run_backward(model, device)
    name = "bias" if original else "flat_param"
    listed = [p for n, p in model.named_parameters() if name in n]
    with pytest.raises(distclip.LayoutError, match="Pass the wrapped module"):
        distclip.Clipper(listed)
    clipper = distclip.Clipper(listed, distclip.ClipNorm(0.5), modules=iter([model]))
    grads = [whole.middle.bias.grad] if original else [p.grad for p in whole.parameters()]
    expected = reference.total_norm(grads)
    report = clipper.clip_()
    assert report.clipped
    torch.testing.assert_close(report.total_norm.double().cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(clipper.clip_().total_norm.cpu(), torch.tensor(0.5))


@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_listed_parameters_with_their_module(four_ranks: Ranks, original: bool) -> None:
    four_ranks.run(listed_parameters_with_their_module, original, four_ranks.device)


@pytest.mark.parametrize("given", [None, "model", [nn.Parameter(torch.zeros(1))]])
def test_modules_are_modules(given: object) -> None:
    with pytest.raises(TypeError, match="in modules="):
        distclip.Clipper([nn.Parameter(torch.zeros(1))], modules=given)
