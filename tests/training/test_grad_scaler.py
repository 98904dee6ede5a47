"""Loss-scaled gradients: one multiplication, and a scaler that says the same on every rank."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import distclip
from tests.support import reference, wrapped
from tests.support.layouts import LAYOUTS, UNSHARDED, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, mesh
from tests.support.training import MAX_NORM, loss_of, make_model, make_scaler, weights
from tests.support.wrapped import local


def scaled_model(scaler: GradScaler) -> nn.Module:
    model = make_model()
    scaler.scale(loss_of(model, 0)).backward()
    return model


def clipper_of(params: object, **options: object) -> distclip.Clipper:
    return distclip.Clipper(params, distclip.ClipNorm(MAX_NORM), **options)


def clipped_by_reference() -> list[Tensor]:
    model = make_model()
    loss_of(model, 0).backward()
    grads = [p.grad for p in model.parameters()]
    assert reference.total_norm(grads) > 2 * MAX_NORM
    return [g.float() for g in reference.clip_norm(grads, MAX_NORM)]


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def test_the_norm_is_of_the_unscaled_gradients_and_torch_goes_on() -> None:
    for scaler in (make_scaler(), make_scaler(enabled=False), make_scaler(scale=3.0)):
        model = scaled_model(scaler)
        optimizer = SGD(model.parameters(), lr=0.1)
        report = clipper_of(model).clip_(optimizer, scaler=scaler)
        torch.testing.assert_close(grads_of(model), clipped_by_reference(), rtol=1e-6, atol=1e-9)
        assert report.clipped
        before = weights(model)
        if scaler.is_enabled():
            state = scaler._per_optimizer_states[id(optimizer)]
            assert state["stage"] is OptState.UNSCALED
            assert [float(t) for t in state["found_inf_per_device"].values()] == [0.0]
            with pytest.raises(RuntimeError, match="already been called"):
                scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        expected = before - 0.1 * torch.cat([g.flatten() for g in clipped_by_reference()])
        torch.testing.assert_close(weights(model), expected)


def test_calling_twice_and_after_unscale() -> None:
    for first in ("clip_", "unscale_"):
        scaler = make_scaler()
        model = scaled_model(scaler)
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = clipper_of(model)
        if first == "clip_":
            assert clipper.clip_(optimizer, scaler=scaler).clipped
            assert math.isclose(
                clipper.clip_(optimizer, scaler=scaler).total_norm, MAX_NORM, rel_tol=1e-6
            )
        else:
            scaler.unscale_(optimizer)
            assert clipper.clip_(optimizer, scaler=scaler).clipped
        torch.testing.assert_close(grads_of(model), clipped_by_reference(), rtol=1e-6, atol=1e-9)
        scaler.step(optimizer)
        for call in (clipper.clip_, clipper.step):
            with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
                call(optimizer, scaler)
        scaler.update()


def test_mistakes_have_an_error() -> None:
    scaler = make_scaler()
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(AssertionError, match="_scale is None"):  # torch's own: nothing was scaled
        clipper_of(model).clip_(optimizer, scaler=scaler)
    model = scaled_model(scaler)
    before = [g.clone() for g in grads_of(model)]
    with pytest.raises(ValueError, match="without an optimizer"):
        clipper_of(model).clip_(scaler=scaler)
    part = SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"no optimizer given steps '2.weight'"):
        clipper_of(model).clip_(part, scaler=scaler)
    with pytest.raises(ValueError, match=r"2 parameters of the optimizer are not"):
        clipper_of(model[0]).step(SGD(model.parameters(), lr=0.1), scaler)
    with pytest.raises(RuntimeError, match="Closure use"):
        clipper_of(model).step(optimizer, scaler, closure=lambda: loss_of(model, 0))
    torch.testing.assert_close(grads_of(model), before, rtol=0, atol=0)
    # What the errors advise.
    whole_optimizer = SGD(model.parameters(), lr=0.1)
    scaler.unscale_(whole_optimizer)
    assert clipper_of(model[0]).step(whole_optimizer, scaler).clipped


@pytest.mark.parametrize("fused", [True, False])
def test_several_optimizers_under_one_scaler(fused: bool) -> None:
    """One clipper over both, or one for each; an overflow in one skips what shares its norm, and
    halves the scale.
    """
    for shared, overflow in ((True, False), (True, True), (False, False), (False, True)):
        scaler = make_scaler()
        model = scaled_model(scaler)
        parts = [model[0], model[2]]
        optimizers = [SGD(part.parameters(), lr=0.1, fused=fused) for part in parts]
        if overflow:
            model[0].weight.grad[0, 0] = math.inf
        before = [weights(part) for part in parts]
        if shared:
            report = clipper_of(model).step(optimizers, scaler)
            assert report.clipped or overflow
        else:
            clippers = [clipper_of(part) for part in parts]
            reports = [c.clip_(o, scaler=scaler) for c, o in zip(clippers, optimizers, strict=True)]
            assert reports[1].clipped
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (512 if overflow else 1024)
        moved = [
            not torch.equal(weights(part), was) for part, was in zip(parts, before, strict=True)
        ]
        assert moved == [not overflow, not (overflow and shared)]


def test_one_optimizer_is_unscaled_and_the_other_not() -> None:
    scaler = make_scaler()
    model = scaled_model(scaler)
    optimizers = [SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])]
    scaler.unscale_(optimizers[0])
    assert clipper_of(model).clip_(optimizers, scaler=scaler).clipped
    torch.testing.assert_close(grads_of(model), clipped_by_reference(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", ["propagate", "raise", "skip", "zero"])
def test_overflow_under_each_rule_is_the_scalers(rule: str) -> None:
    for fused in (True, False):
        for way in ("clip_", "step", "attach"):
            scaler = make_scaler()
            model = scaled_model(scaler)
            optimizer = AdamW(model.parameters(), lr=0.1, fused=fused, foreach=not fused)
            clipper = clipper_of(model, on_nonfinite=rule)
            model[0].weight.grad[0, 0] = math.inf
            before = weights(model)
            attached = clipper.attach(optimizer, scaler) if way == "attach" else None
            raises = rule == "raise" and (
                fused or attached is None
            )  # else the scaler skips before the hook
            with (
                pytest.raises(distclip.NonFiniteGradientError)
                if raises
                else contextlib.nullcontext()
            ):
                clipper.step(optimizer, scaler) if way == "step" else None
                clipper.clip_(optimizer, scaler=scaler) if way == "clip_" else None
                scaler.step(optimizer) if way != "step" else None
            assert torch.equal(weights(model), before)
            scaler.update()
            assert scaler.get_scale() == 512


def skips_and_halves_everywhere(layout: str, sharded_scaler: bool) -> None:
    """An overflow on rank 1 alone; plain tensors of a pipeline or of experts are on no mesh of
    their own.
    """
    placed = LAYOUTS["plain" if layout == "pipeline" else layout]
    wholes = random_wholes(placed, seed=dist.get_rank() if layout == "pipeline" else 2)
    options = {"mesh": mesh((4,), ("pp",))} if layout == "pipeline" else {}
    for way in ("clip_", "step", "unscale_"):
        if way == "unscale_" and layout in ("two meshes", "beside plain"):
            continue  # torch cannot unscale them
        params = lay_out(wholes, placed)
        named = [(f"{dist.get_rank()}.{i}" if options else f"{i}", p) for i, p in enumerate(params)]
        optimizer = SGD(params, lr=0.1, foreach=False)
        scaler = (ShardedGradScaler if sharded_scaler else GradScaler)("cpu", init_scale=1024.0)
        clipper = distclip.Clipper(named, distclip.ClipNorm(MAX_NORM), **options)
        for overflow in (False, True):
            for param, one in zip(params, lay_out(wholes, placed), strict=True):
                param.grad = one.grad * 1024
            scaler.scale(torch.ones(()))
            if overflow and dist.get_rank() == 1:
                next(local(p.grad) for p in params if local(p.grad).numel()).view(-1)[0] = math.inf
            before = [local(p.detach()).clone() for p in params]
            if way == "unscale_":
                scaler.unscale_(optimizer)
            with CommDebugMode() as comms:
                report = (
                    clipper.step(optimizer, scaler)
                    if way == "step"
                    else clipper.clip_(optimizer, scaler)
                )
            if overflow:
                assert comms.get_total_counts() == 1
            if way != "step":
                scaler.step(optimizer)
            scaler.update()
            assert report.clipped or overflow
            assert report.finite != overflow
            assert scaler.get_scale() == (512 if overflow else 1024)
            after = [local(p.detach()) for p in params]
            changed = any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
            assert changed != overflow or not any(a.numel() for a in after)
        if way == "clip_" and not options:
            clipped = reference.clip_norm(wholes, MAX_NORM)
            for param, expected in zip(params, clipped, strict=True):
                torch.testing.assert_close(
                    -10 * whole(param.detach()).double(), expected, rtol=1e-5, atol=1e-7
                )


@pytest.mark.parametrize("sharded_scaler", [False, True], ids=["GradScaler", "ShardedGradScaler"])
@pytest.mark.parametrize(
    "layout", [*(name for name in LAYOUTS if name not in UNSHARDED), "pipeline"]
)
def test_overflow_on_one_rank_skips_and_halves_everywhere(
    four_ranks: Ranks, layout: str, sharded_scaler: bool
) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(skips_and_halves_everywhere, layout, sharded_scaler)


def attached_with_the_scaler_all_ranks_skip() -> None:
    """Plain experts and a fused optimizer: torch's check sees this rank alone, the hook all."""
    param = nn.Parameter(torch.ones(4))
    optimizer = AdamW([param], lr=0.1, fused=True)
    scaler = make_scaler()
    clipper = distclip.Clipper([(f"expert{dist.get_rank()}", param)], mesh=mesh((4,), ("pp",)))
    attached = clipper.attach(optimizer, scaler)
    for overflow in (True, False):
        scaler.scale(torch.ones(()))
        param.grad = torch.full((4,), math.inf if overflow and dist.get_rank() == 2 else 4096.0)
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, param) == overflow
        assert attached.report.clipped or overflow
        assert scaler.get_scale() == 512


def test_attached_with_the_scaler(four_ranks: Ranks) -> None:
    four_ranks.run(attached_with_the_scaler_all_ranks_skip)


def check_against_the_whole_model(
    model: nn.Module, report: distclip.Report, max_norm: float, rtol: float
) -> None:
    expected = reference.total_norm(wrapped.whole_gradients())
    torch.testing.assert_close(report.total_norm.double(), expected, rtol=rtol, atol=0)
    assert report.clipped
    clipped = [local(p.grad).double().norm() ** 2 for p in model.parameters() if p.grad is not None]
    together = torch.stack([torch.zeros((), dtype=torch.float64), *clipped]).sum()
    dist.all_reduce(together)
    torch.testing.assert_close(together.sqrt(), torch.tensor(max_norm).double(), rtol=rtol, atol=0)


def fp16_gradients(device: str) -> None:
    """FSDP1 keeps them in fp16: scaled by 64 their norm passes what unscaled fp16 gradients would
    hold, or not.
    """
    mixed = MixedPrecision(
        param_dtype=torch.float16, reduce_dtype=torch.float16, keep_low_precision_grads=True
    )
    kwargs = {"use_orig_params": False, "mixed_precision": mixed, "device_id": torch.device("cpu")}
    for overflow in (False, True):
        model = FullyShardedDataParallel(wrapped.make_model(device), **kwargs)
        optimizer = SGD(model.parameters(), lr=0.1)
        scaler = ShardedGradScaler("cpu", init_scale=16.0)
        tokens = wrapped.tokens_of_all_ranks().chunk(4)[dist.get_rank()]
        scaler.scale(wrapped.loss_of(model, tokens).float()).backward()
        (param,) = model.parameters()
        assert param.grad.dtype == torch.float16
        if overflow and dist.get_rank() == 3:
            param.grad[0] = math.inf
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
        report = clipper.clip_(optimizer, scaler=scaler)
        if not overflow:
            check_against_the_whole_model(model, report, MAX_NORM, rtol=2e-2)
        assert report.finite != overflow
        if overflow:
            before = param.detach().clone()
            scaler.step(
                optimizer
            )  # skips: an fp32 step with fp16 gradients is the user's to prepare
            assert torch.equal(before, param)
            scaler.update()
            assert scaler.get_scale() == 8


def test_fp16_gradients_under_fsdp1(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(fp16_gradients, four_ranks.device)


def accumulates(kind: str, device: str) -> None:
    """Two micro-batches a rank; communication and clipping on the last alone."""
    model = wrapped.make_model(device)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=mesh((4,), ("fsdp",), device))
    scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=kind != "fsdp1")
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    micro_batches = wrapped.tokens_of_all_ranks().chunk(4)[dist.get_rank()].chunk(2)
    for index, tokens in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        if kind == "fsdp2":
            model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or kind == "fsdp2" else model.no_sync():
            scaler.scale(wrapped.loss_of(model, tokens) / len(micro_batches)).backward()
    report = clipper.step(optimizer, scaler)
    scaler.update()
    expected = reference.total_norm(wrapped.whole_gradients())
    torch.testing.assert_close(report.total_norm.double(), expected, rtol=1e-5, atol=0)
    assert report.clipped
    assert scaler.get_scale() == 1024
    if kind != "ddp":
        check_against_the_whole_model(model, report, MAX_NORM, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_gradient_accumulation(four_ranks: Ranks, kind: str) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(accumulates, kind, four_ranks.device)


def fused_after_unscale_of_a_sharded_scaler() -> None:
    """`unscale_` of ShardedGradScaler has found_inf in one dim, and a fused step takes none."""
    for wrapped_too in (False, True):
        param = nn.Parameter(torch.ones(4))
        optimizer = AdamW([param], lr=0.1, fused=True)
        scaler = ShardedGradScaler("cpu", init_scale=1024.0)
        handle = Holder(optimizer) if wrapped_too else optimizer
        clipper = distclip.Clipper([param], distclip.ClipNorm(MAX_NORM))
        for overflow in (False, True):
            scaler.scale(torch.ones(()))
            param.grad = torch.full((4,), math.inf if overflow else 4096.0)
            before = param.detach().clone()
            scaler.unscale_(optimizer)
            assert clipper.clip_(handle, scaler).clipped or overflow
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (512 if overflow else 1024)
            assert torch.equal(before, param) == overflow


class Holder:
    """Passes steps on, as accelerate's wrapper."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def test_a_fused_optimizer_after_unscale_of_a_sharded_scaler(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(fused_after_unscale_of_a_sharded_scaler)
