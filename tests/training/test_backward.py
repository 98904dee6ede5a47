"""Gradients measured during backward: the same numbers, from backward alone, and never stale ones.

`test_staleness.py` has the writes that torch does not count.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace as replace_field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.norms.measure import NormBuffer
from distclip.training import backward as backward_norms
from distclip.training.backward import BackwardNorms
from tests.support import reference
from tests.support.overlap import of_any_size, sizes
from tests.support.ranks import Ranks, mesh, same_bits_everywhere
from tests.support.wrapped import WRAPPERS, Model, local, loss_of, make_model, tokens_of_all_ranks

POLICIES = {
    "2": distclip.ClipNorm(0.5),
    "1": distclip.ClipNorm(0.5, 1.0),
    "inf": distclip.ClipNorm(0.01, math.inf),
    "8": distclip.ClipNorm(0.5, 8.0),
    "value": distclip.ClipValue(0.05),
    "tensor": distclip.ClipTensorNorm(0.2),
    "unit": distclip.AGC(0.05),
}


@pytest.fixture(autouse=True)
def _of_any_size() -> Iterator[None]:
    with sizes():
        yield


def gradients(model: nn.Module) -> list[Tensor]:
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


@contextmanager
def nothing_is_measured() -> Iterator[None]:
    """Fails where a gradient is measured inside."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("measured again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormBuffer, "put_many", fail)
        patch.setattr("distclip.norms.measure._measure_group", fail)
        yield


def backward(model: nn.Module, batch: Tensor) -> None:
    loss_of(model, batch.to(next(model.parameters()).device)).backward()


def batches(count: int) -> list[Tensor]:
    """Of this rank, one for each micro-batch."""
    mine = tokens_of_all_ranks().chunk(dist.get_world_size() if dist.is_initialized() else 1)
    return list(mine[dist.get_rank() if dist.is_initialized() else 0].chunk(count))


def make(kind: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(1)
    return make_model(device) if kind == "plain" else WRAPPERS[kind][0](make_model(device), device)


# In one process


def model_and_clipper(
    policy: Any = POLICIES["2"], **options: Any
) -> tuple[Model, distclip.Clipper]:
    model = make_model()
    return model, distclip.Clipper(model, policy, overlap=True, **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_same_gradients_as_without(policy: str) -> None:
    (early, clipper), late = model_and_clipper(POLICIES[policy]), make_model()
    for batch in batches(2):
        backward(early, batch)
        backward(late, batch)
    report, expected = clipper.clip_(), distclip.Clipper(late, POLICIES[policy]).clip_()
    assert expected.clipped
    torch.testing.assert_close(report.total_norm, expected.total_norm, rtol=1e-7, atol=0)
    for a, b in zip(gradients(early), gradients(late), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_alone_measures(policy: str) -> None:
    model, clipper = model_and_clipper(POLICIES[policy])
    backward(model, batches(1)[0])
    norm = reference.total_norm(gradients(model), POLICIES[policy].norm_type)
    with nothing_is_measured():
        report = clipper.clip_()
    torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)


def test_the_last_of_several_micro_batches_counts() -> None:
    model, clipper = model_and_clipper()
    for batch in batches(3):
        backward(model, batch)
    norm = reference.total_norm(gradients(model))
    with nothing_is_measured():
        report = clipper.clip_()
    torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)


def multiply(model: nn.Module) -> None:
    model.head.weight.grad.mul_(3)


def replace(model: nn.Module) -> None:
    model.head.weight.grad = torch.full_like(model.head.weight, 0.3)


def drop(model: nn.Module) -> None:
    model.head.weight.grad = None


def drop_all_but_one(model: nn.Module) -> None:
    for param in model.parameters():
        if param is not model.head.bias:
            param.grad = None


def zeros(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def inside_a_view(model: nn.Module) -> None:
    model.head.weight.grad.view(-1)[:5].add_(7)


def a_sparse_one(model: nn.Module) -> None:
    model.embed.weight.grad = model.embed.weight.grad.to_sparse()


def one_more_backward_that_raises(model: nn.Module) -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ValueError("in backward")

    x = Raises.apply(model.embed(batches(1)[0]))
    with pytest.raises(ValueError, match="in backward"):
        model.head(model.blocks[1](x)).square().sum().backward()


def the_same_graph_twice(model: nn.Module) -> None:
    loss = loss_of(model, batches(1)[0])
    loss.backward(retain_graph=True)
    loss.backward()


CHANGES = [
    multiply,
    replace,
    drop,
    drop_all_but_one,
    zeros,
    inside_a_view,
    a_sparse_one,
    one_more_backward_that_raises,
    the_same_graph_twice,
]


@pytest.mark.parametrize("policy", ["2", "inf", "tensor", "unit"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_it_was_measured_is_measured_again(
    change: Callable[[nn.Module], None], policy: str
) -> None:
    model, clipper = model_and_clipper(POLICIES[policy])
    for _ in range(2):
        backward(model, batches(1)[0])
        change(model)
        if change is a_sparse_one and policy == "unit":
            with pytest.raises(ValueError, match=r"units of 'embed\.weight'.*sparse"):
                clipper.clip_()
            return
        values = [g.coalesce().values() if g.is_sparse else g for g in gradients(model)]
        norm = reference.total_norm(values, POLICIES[policy].norm_type)
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)
        model.zero_grad()


def test_a_parameter_without_gradient_in_the_next_step() -> None:
    model, clipper = model_and_clipper()
    everything = list(model.parameters())
    for used in (everything, everything[3:], everything):
        model.zero_grad()
        loss_of(model, batches(1)[0]).backward(inputs=used)
        norm = reference.total_norm(gradients(model))
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_bucket_that_was_reduced_but_never_written() -> None:
    model, clipper = model_and_clipper()
    backward(model, batches(1)[0])
    clipper._held.backward.reduced([model.head.weight], [torch.full_like(model.head.weight, 100.0)])
    norm = reference.total_norm(gradients(model))
    torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_hook_of_the_user_that_comes_later_is_seen() -> None:
    model, clipper = model_and_clipper()

    def multiply_it(param: Tensor) -> None:
        param.grad.mul_(5)

    model.head.weight.register_post_accumulate_grad_hook(multiply_it)
    backward(model, batches(1)[0])
    norm = reference.total_norm(gradients(model))
    torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_second_call_measures_what_the_first_has_left() -> None:
    model, clipper = model_and_clipper()
    backward(model, batches(1)[0])
    assert clipper.clip_().clipped
    again = clipper.clip_()
    torch.testing.assert_close(
        again.total_norm.double(), reference.total_norm(gradients(model)), rtol=1e-6, atol=0
    )


def test_nan_is_found_and_named() -> None:
    model, clipper = model_and_clipper(on_nonfinite="skip")
    backward(model, batches(1)[0])
    model.head.bias.grad.fill_(math.nan)
    report = clipper.clip_()
    assert not report.finite
    assert report.nonfinite_parameters() == {"head.bias": [0]}


def test_gradients_are_let_go() -> None:
    model, clipper = model_and_clipper()
    backward(model, batches(1)[0])
    kept = clipper.clip_()  # a report that is kept does not keep them either
    alive = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad()
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []
    assert kept.clipped


def test_a_clipper_that_is_gone_leaves_no_hook() -> None:
    model, clipper = model_and_clipper()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    del clipper
    gc.collect()
    backward(model, batches(1)[0])  # its hooks do nothing
    clipper = distclip.Clipper(model, overlap=True)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    model.zero_grad()
    backward(model, batches(1)[0])
    with nothing_is_measured():
        clipper.clip_()


def collected_between_hooks(model: nn.Module) -> None:
    """The garbage collector runs while torch goes through the hooks of a parameter."""
    param = max(model.parameters(), key=torch.numel)
    held: list[distclip.Clipper] = []
    seen: list[str] = []

    def collect(_: Tensor) -> None:
        seen.append("first")
        held.clear()
        gc.collect()

    param.register_post_accumulate_grad_hook(collect)
    held.append(distclip.Clipper(model, overlap=True))
    param.register_post_accumulate_grad_hook(lambda _: seen.append("last"))
    backward(model, batches(1)[0])
    assert seen == ["first", "last"]
    assert not held


def test_a_clipper_is_collected_between_two_hooks() -> None:
    collected_between_hooks(make_model())


def test_loss_scale() -> None:
    model, clipper = model_and_clipper()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, batches(1)[0])
    norm = reference.total_norm(gradients(model))
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    report = clipper.clip_(optimizer, scaler)
    torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)


# Which are measured in backward, and when


@contextmanager
def put_together() -> Iterator[list[int]]:
    """How many gradients are measured at each time in backward."""
    counts: list[int] = []
    put_many = NormBuffer.put_many

    def counting(buffer: NormBuffer, members: list[int], grads: list[Tensor]) -> None:
        counts.append(len(members))
        put_many(buffer, members, grads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormBuffer, "put_many", counting)
        yield counts


@pytest.mark.parametrize("policy", ["2", "inf", "8", "tensor", "unit"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_while_it_was_collected(
    change: Callable[[nn.Module], None], policy: str
) -> None:
    with sizes(together=300):
        model, clipper = model_and_clipper(POLICIES[policy])
    for num in (1, 2, 1):
        for _ in range(num):
            backward(model, batches(1)[0])
            change(model)
        if change is a_sparse_one and policy == "unit":
            return
        values = [g.coalesce().values() if g.is_sparse else g for g in gradients(model)]
        norm = reference.total_norm(values, POLICIES[policy].norm_type)
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)
        model.zero_grad()


def square(size: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, size))


def test_gradients_that_become_final_one_by_one_are_measured_together() -> None:
    params = [square(100) for _ in range(10)]
    with sizes(together=300):
        clipper = distclip.Clipper(params, overlap=True)
    with put_together() as counts:
        torch.cat(params).square().sum().backward()
    assert counts == [3, 3, 3]  # the last one is left to the call
    norm = reference.total_norm([p.grad for p in params])
    torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_each_stream_measures_what_was_made_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would have to wait for it."""
    params = [square(100) for _ in range(12)]
    current: list[str] = [""]
    monkeypatch.setattr(backward_norms, "current_stream", lambda _: current[0])
    with sizes(together=300):
        clipper = distclip.Clipper(params, overlap=True)
    made_on: dict[int, str] = {}
    put_many, measured = NormBuffer.put_many, []

    def recording(buffer: NormBuffer, members: list[int], grads: list[Tensor]) -> None:
        measured.extend(members)
        assert {made_on[i] for i in members} == {current[0]}
        put_many(buffer, members, grads)

    monkeypatch.setattr(NormBuffer, "put_many", recording)
    for offset in (0, 1):  # the second time each on the other stream
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, float(i + offset))
            made_on[i] = current[0] = "ab"[(i + offset) % 2]
            clipper._held.backward.accumulated(param)
    assert sorted(set(measured)) == list(range(12))
    norm = reference.total_norm([p.grad for p in params])
    with nothing_is_measured():
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_gradient_that_was_replaced_while_it_was_collected() -> None:
    first, second = params = [square(100), square(250)]
    with sizes(together=300):
        clipper = distclip.Clipper(params, overlap=True)
    first.square().sum().backward()
    first.grad = torch.full_like(first, 7.0)
    second.square().sum().backward()
    norm = reference.total_norm([p.grad for p in params])
    with nothing_is_measured():
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_gradient_that_comes_again_counts_as_changed() -> None:
    """Even if neither the version nor the sample shows it."""
    param = square(5000)
    clipper = distclip.Clipper([param], overlap=True)
    param.square().sum().backward()
    param.grad.data[1] = 1000.0  # between two elements of the sample
    clipper._held.backward._together = 10**9
    clipper._held.backward.accumulated(param)
    norm = reference.total_norm([param.grad])
    torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_short_gradients_are_left_to_the_call() -> None:
    long, short = params = [square(300), square(299)]
    with sizes(large=300):
        clipper = distclip.Clipper(params, overlap=True)
    assert long._post_accumulate_grad_hooks
    assert not short._post_accumulate_grad_hooks
    for used in (params, [long], [short], params):
        for param in params:
            param.grad = None
        torch.stack([p.square().sum() for p in used]).sum().backward()
        norm = reference.total_norm([p.grad for p in used])
        with put_together() as counts:
            report = clipper.clip_()
        assert not counts
        torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)


def test_nan_in_a_short_gradient_is_named() -> None:
    long, short = square(300), square(20)
    with sizes(large=300):
        clipper = distclip.Clipper([("long", long), ("short", short)], overlap=True)
    (long.sum() + short.sum()).backward()
    short.grad[3] = math.nan
    assert clipper.clip_().nonfinite_parameters() == {"short": [0]}


@pytest.mark.parametrize("policy", ["2", "tensor", "unit"])
def test_only_gradients_on_the_device_are_heard(policy: str) -> None:
    """FSDP2 waits for each gradient that it offloads, if its parameter has a hook."""
    model = make_model()
    plan = distclip.Clipper(model, POLICIES[policy]).plan
    elsewhere = BackwardNorms(replace_field(plan, device=torch.device("cuda")), [model])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    there = make_model().to("meta")
    plan = distclip.Clipper(there, POLICIES[policy]).plan
    here = BackwardNorms(replace_field(plan, device=torch.device("meta")), [there])
    # Units are not measured again on an accelerator where a sample differs.
    assert all(bool(p._post_accumulate_grad_hooks) == (policy == "2") for p in there.parameters())
    del elsewhere, here


def test_without_values_and_streams() -> None:
    model = make_model().to("meta")
    clipper = distclip.Clipper(model, overlap=True)
    for param in model.parameters():
        param.grad = torch.empty_like(param)
        clipper._held.backward.accumulated(param)
    assert clipper.clip_().total_norm.shape == ()


# On ranks


@of_any_size
def buckets_are_measured_at_once() -> None:
    wrapped = DistributedDataParallel(make_model())
    clipper = distclip.Clipper(wrapped, distclip.ClipNorm(0.5), overlap=True)
    num = len([*wrapped.parameters()])
    for _ in range(2):
        wrapped.zero_grad()
        with put_together() as counts:
            backward(wrapped, batches(1)[0])
        assert sum(counts) == num
        assert len(counts) <= 2  # buckets
        norm = reference.total_norm(gradients(wrapped))
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_ddp_measures_a_bucket_at_once(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(buckets_are_measured_at_once)


def ddp_without_large_parameters() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    wrapped = DistributedDataParallel(make_model())
    clipper = distclip.Clipper(wrapped, distclip.ClipNorm(0.5), overlap=True)
    wrapped.register_comm_hook(None, fp16_compress_hook)  # nobody has taken its place
    backward(wrapped, batches(1)[0])
    norm = reference.total_norm(gradients(wrapped))
    torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)


def test_ddp_keeps_its_hook_where_nothing_is_measured_in_backward(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(ddp_without_large_parameters)


def without_reduction(model: nn.Module) -> AbstractContextManager[Any]:
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
    return nullcontext()


def with_reduction(model: nn.Module) -> None:
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(True)


@of_any_size
def measures_reduced_gradients(kind: str, policy: str, device: str) -> None:
    model = make(kind, device)
    clipper = distclip.Clipper(model, POLICIES[policy], overlap=True)
    plain = distclip.Clipper(model, distclip.ClipNorm(math.inf, POLICIES[policy].norm_type))
    for count, reduce_all in [(1, True), (2, False), (2, True), (1, True)]:
        for batch in (micro := batches(count))[:-1]:
            with nullcontext() if reduce_all else without_reduction(model):
                backward(model, batch)
        with_reduction(model)
        backward(model, micro[-1])
        norm = plain.clip_().total_norm
        # FSDP2 adds to the gradients of a unit one after the other, and each such write counts for
        # all of them, since they lie in one buffer: then the call measures again.
        at_once = kind == "ddp" or len(micro) == 1 or not reduce_all
        # On an accelerator, backward measures no units.
        at_once = at_once and (device == "cpu" or policy not in ("tensor", "unit"))
        with nothing_is_measured() if at_once else nullcontext():
            report = clipper.clip_()
        torch.testing.assert_close(report.total_norm, norm, rtol=2e-7, atol=0)
        assert same_bits_everywhere(report.total_norm)
        assert report.clipped
        model.zero_grad()


@pytest.mark.parametrize("policy", ["2", "inf", "tensor", "unit"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "hsdp"])
def test_ranks_measure_what_was_reduced(four_ranks: Ranks, kind: str, policy: str) -> None:
    four_ranks.run(measures_reduced_gradients, kind, policy, four_ranks.device)


def collects_reduced_gradients(kind: str, policy: str, device: str) -> None:
    for together in (50, 400, 10**9):
        model = make(kind, device)
        with sizes(together=together):
            clipper = distclip.Clipper(model, POLICIES[policy], overlap=True)
        plain = distclip.Clipper(model, distclip.ClipNorm(math.inf, POLICIES[policy].norm_type))
        for count, reduce_all in [(1, True), (2, False), (2, True), (1, True)]:
            for batch in (micro := batches(count))[:-1]:
                with nullcontext() if reduce_all else without_reduction(model):
                    backward(model, batch)
            with_reduction(model)
            backward(model, micro[-1])
            norm = plain.clip_().total_norm
            report = clipper.clip_()
            torch.testing.assert_close(report.total_norm, norm, rtol=2e-7, atol=0)
            assert same_bits_everywhere(report.total_norm)
            assert report.clipped
            model.zero_grad()


@pytest.mark.parametrize("policy", ["2", "inf", "tensor", "unit"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_collect_what_was_reduced(four_ranks: Ranks, kind: str, policy: str) -> None:
    four_ranks.run(collects_reduced_gradients, kind, policy, four_ranks.device)


@of_any_size
def clips_as_without(kind: str, policy: str, device: str) -> None:
    results = []
    for overlap in (True, False):
        model = make(kind, device)
        clipper = distclip.Clipper(model, POLICIES[policy], overlap=overlap)
        for _ in range(2):
            model.zero_grad()
            backward(
                model, batches(1)[0] if kind not in ("tp", "fsdp2 x tp") else tokens_of_all_ranks()
            )
            report = clipper.clip_()
        assert report.clipped
        results.append((report.total_norm, gradients(model)))
    (norm, early), (expected, late) = results
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(early, late, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("policy", ["2", "unit"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp", "fsdp2 x tp", "fsdp1 FULL_SHARD original"])
def test_every_wrapper_clips_as_without(four_ranks: Ranks, kind: str, policy: str) -> None:
    four_ranks.run(clips_as_without, kind, policy, four_ranks.device)


@of_any_size
def ddp_variants() -> None:
    for options in (
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 0.0001},
    ):
        model = make_model()
        model.unused = nn.Linear(3, 3)
        for param in model.unused.parameters():
            param.requires_grad_("find_unused_parameters" in options)
        wrapped = DistributedDataParallel(model, **options)
        clipper = distclip.Clipper(wrapped, distclip.ClipNorm(0.5), overlap=True)
        for _ in range(3):
            backward(wrapped, batches(1)[0])
            norm = reference.total_norm(gradients(wrapped))
            with nothing_is_measured():
                report = clipper.clip_()
            torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)
            wrapped.zero_grad()


def test_ddp_with_its_options(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(ddp_variants)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.first(x) + (self.second(x) if both else 0)


@of_any_size
def an_unused_head_keeps_its_gradient(view: bool) -> None:
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(
        TwoHeads(), find_unused_parameters=True, gradient_as_bucket_view=view
    )
    clipper = distclip.Clipper(wrapped, distclip.ClipNorm(0.1), overlap=True)
    assert not any(p._post_accumulate_grad_hooks for p in wrapped.parameters())
    for _ in range(2):
        for both in (True, False):
            wrapped(torch.ones(2, 3), both).square().sum().backward()
        norm = reference.total_norm(gradients(wrapped))
        assert norm > reference.total_norm(gradients(wrapped.module.first))
        torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)
        wrapped.zero_grad()


@pytest.mark.parametrize("view", [False, True])
def test_what_ddp_did_not_use_in_the_last_micro_batch(four_ranks: Ranks, view: bool) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(an_unused_head_keeps_its_gradient, view)


@of_any_size
def a_backward_that_raises_under_ddp() -> None:
    wrapped = DistributedDataParallel(make_model(), bucket_cap_mb=0.0001)
    clipper = distclip.Clipper(wrapped, distclip.ClipNorm(math.inf), overlap=True)
    backward(wrapped, batches(1)[0])
    norm = clipper.clip_().total_norm
    one_more_backward_that_raises_in(wrapped)  # DDP itself needs a new module after that
    expected = reference.total_norm(gradients(wrapped))
    torch.testing.assert_close(clipper.clip_().total_norm.double(), expected, rtol=1e-6, atol=0)
    assert norm > 0


def one_more_backward_that_raises_in(wrapped: nn.Module) -> None:
    def fail(grad: Tensor) -> Tensor:
        raise ValueError("in backward")

    out = wrapped(batches(1)[0])
    handle = wrapped.module.embed.weight.register_hook(fail)
    with pytest.raises(ValueError, match="in backward"):
        out.square().sum().backward()
    handle.remove()


def test_ddp_after_a_backward_that_raised(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(a_backward_that_raises_under_ddp)


@of_any_size
def collected_between_hooks_of_fsdp2(kind: str) -> None:
    collected_between_hooks(WRAPPERS[kind][0](make_model(), "cpu"))


@pytest.mark.parametrize("kind", ["fsdp2", "hsdp"])
def test_a_clipper_is_collected_between_hooks_of_fsdp2(four_ranks: Ranks, kind: str) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(collected_between_hooks_of_fsdp2, kind)


@of_any_size
def second_hook_is_refused() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    wrapped = DistributedDataParallel(make_model())
    wrapped.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(distclip.LayoutError, match="communication hook already"):
        distclip.Clipper(wrapped, overlap=True)
    backward(wrapped, batches(1)[0])
    assert distclip.Clipper(wrapped).clip_().finite


def test_a_second_communication_hook_is_refused(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(second_hook_is_refused)


@of_any_size
def plain_beside_sharded() -> None:
    """A parameter that no hook of FSDP2 concerns, beside those that it shards."""
    model = make_model()
    fully_shard(model.blocks[0], mesh=mesh((4,), ("fsdp",)))
    clipper = distclip.Clipper(model, distclip.ClipNorm(0.5), overlap=True)
    plain = distclip.Clipper(model, distclip.ClipNorm(math.inf))
    backward(model, tokens_of_all_ranks())
    norm = plain.clip_().total_norm
    with nothing_is_measured():
        report = clipper.clip_()
    torch.testing.assert_close(report.total_norm, norm, rtol=2e-7, atol=0)


def test_plain_parameters_beside_sharded_ones(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(plain_beside_sharded)


@pytest.mark.parametrize("policy", [distclip.ClipNorm(0.5), distclip.ClipTensorNorm(0.5)])
def test_gradients_that_torch_conjugates_lazily(policy: distclip.ClipNorm) -> None:
    """Backward of a conjugate leaves a gradient with the conjugate bit."""
    weight = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
    plain = nn.Parameter(torch.randn(4))
    clipper = distclip.Clipper([weight, plain], policy, overlap=True)
    for _ in range(2):
        weight.grad = plain.grad = None
        (torch.randn(5, 6, dtype=torch.complex64) @ weight.conj() * plain).abs().sum().backward()
        assert weight.grad.is_conj()
        before = [weight.grad.clone(), plain.grad.clone()]
        report = clipper.clip_()
        torch.testing.assert_close(
            report.total_norm.double(), reference.total_norm(before), rtol=1e-7, atol=0
        )
        clip = reference.clip_norm if policy.scope is distclip.Scope.MODEL else None
        wanted = (clip or reference.clip_tensor_norm)(before, 0.5)
        for param, want in zip((weight, plain), wanted, strict=True):
            torch.testing.assert_close(param.grad, want.to(param.dtype))
