"""`overlap=True` after writes that `Tensor._version` does not count: the norm is that of now."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import distclip
from distclip.norms import measure
from distclip.norms.measure import NormBuffer
from distclip.norms.plan import Plan
from distclip.training import samples
from tests.support import reference
from tests.support.overlap import of_any_size, sizes
from tests.support.ranks import Ranks, mesh, same_bits_everywhere
from tests.support.wrapped import local, loss_of, make_model, tokens_of_all_ranks

MAX_NORM = 0.5


@pytest.fixture(autouse=True)
def _of_any_size() -> Iterator[None]:
    with sizes():
        yield


def clipper_of(params: Any, policy: Any = None, **options: Any) -> distclip.Clipper:
    policy = policy or distclip.ClipNorm(MAX_NORM)
    return distclip.Clipper(params, policy, overlap=True, **options)


def backward(params: list[Tensor], grads: list[Tensor]) -> None:
    """A real backward that leaves `grads`."""
    terms = [(p * g.conj()).sum() for p, g in zip(params, grads, strict=True)]
    torch.stack([term.real.double() for term in terms]).sum().backward()


def norm_of(params: list[Tensor], norm_type: float = 2.0) -> Tensor:
    grads = [p.grad for p in params if p.grad is not None]
    return reference.total_norm([local(g).detach() for g in grads], norm_type)


def check(report: distclip.Report, expected: Tensor) -> None:
    torch.testing.assert_close(report.total_norm.double(), expected, rtol=1e-6, atol=0)


@contextmanager
def counted_measurements() -> Iterator[list[int]]:
    """The parameters that are measured again."""
    counted: list[int] = []
    measure_group = measure._measure_group

    def counting(rest: list[Tensor | None], plan: Plan, *args: Any, **kwargs: Any) -> Any:
        counted.extend(i for i, grad in enumerate(rest) if grad is not None)
        return measure_group(rest, plan, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormBuffer, "put_many", lambda *_: pytest.fail("put after backward"))
        patch.setattr(measure, "_measure_group", counting)
        yield counted


# Gradients of every kind

LONG = samples.WHOLE + 1


def some_rows(shape: tuple[int, int], rows: list[int], seed: int = 0) -> Tensor:
    grad = torch.zeros(shape)
    grad[rows] = torch.randn(len(rows), shape[1], generator=torch.Generator().manual_seed(seed))
    return grad


def one_element(numel: int) -> Tensor:
    grad = torch.zeros(numel)
    grad[numel // 2 + 1] = 3.0
    return grad


KINDS: dict[str, Callable[[], Tensor]] = {
    "one element": lambda: torch.tensor([2.5]),
    "no dim": lambda: torch.tensor(2.5),
    "short": lambda: torch.linspace(-1, 1, 50),
    "long": lambda: torch.linspace(-1, 1, 9 * LONG),
    "matrix": lambda: torch.linspace(-1, 1, 300 * 500).view(300, 500),
    "rows of 3": lambda: torch.linspace(-1, 1, 3 * LONG).view(-1, 3),
    "rows of 1": lambda: torch.linspace(-1, 1, LONG).view(-1, 1),
    "bfloat16": lambda: torch.linspace(-1, 1, LONG, dtype=torch.bfloat16),
    "float16": lambda: torch.linspace(-1, 1, LONG, dtype=torch.float16),
    "float64": lambda: torch.linspace(-1, 1, LONG, dtype=torch.float64),
    "complex": lambda: torch.linspace(-1, 1, LONG) * (1 + 2j),
    "complex128": lambda: torch.linspace(-1, 1, 40, dtype=torch.complex128) * 1j,
    "images": lambda: torch.randn(8, 7, 20, 20).to(memory_format=torch.channels_last),
    "embedding": lambda: some_rows((999, 64), [5, 700]),
    "embedding, wide": lambda: some_rows((400, 300), [7]),
    "one in many": lambda: one_element(9 * LONG),
    "zeros": lambda: torch.zeros(LONG),
    "infinite": lambda: torch.full((LONG,), math.inf),
}


def made(kind: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters of which the second has the gradient in question, and their gradients."""
    grads = [torch.full((7,), 0.25), KINDS[kind](), torch.full((6,), 0.5)]
    return [nn.Parameter(torch.zeros_like(grad)) for grad in grads], grads


def multiplied(grad: Tensor) -> None:
    grad.data.mul_(1 / 4)


def divided(grad: Tensor) -> None:
    grad.data.div_(65536.0)


def negated_and_doubled(grad: Tensor) -> None:
    grad.data.mul_(-2)


def copied(grad: Tensor) -> None:
    grad.data.copy_(torch.full_like(grad, 0.75))


def cleared(grad: Tensor) -> None:
    grad.data.zero_()


def detached(grad: Tensor) -> None:
    torch._foreach_mul_([grad.data], 3.0)


def by_numpy(grad: Tensor) -> None:
    if grad.dtype is torch.bfloat16:
        return multiplied(grad)
    array = grad.detach().numpy()
    np.multiply(array, array.dtype.type(3), out=array)
    return None


def other_memory(grad: Tensor) -> None:
    grad.data = torch.full_like(grad, 2.0)


def a_flat_buffer(grad: Tensor) -> None:
    torch.as_strided(grad.data, (grad.numel(),), (1,)).mul_(5)


WRITES = [
    multiplied,
    divided,
    negated_and_doubled,
    copied,
    cleared,
    detached,
    by_numpy,
    other_memory,
    a_flat_buffer,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_all_elements_is_seen(kind: str, write: Callable[[Tensor], None]) -> None:
    for norm_type in (2.0, math.inf):
        params, grads = made(kind)
        clipper = clipper_of(params, distclip.ClipNorm(1e-3, norm_type))
        for _ in range(2):
            backward(params, grads)
            write(params[1].grad)
            expected = norm_of(params, norm_type)
            report = clipper.clip_()
            assert report.clipped or expected.isinf()
            check(report, expected)
            for param in params:
                param.grad = None


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 8.0, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_did_not_change_is_not_measured_again(
    kind: str, norm_type: float, on_device: bool
) -> None:
    params, grads = made(kind)
    clipper = clipper_of(params, distclip.ClipNorm(1e-3, norm_type))
    clipper._held.backward._waits = not on_device
    clipper._held.backward._is_too_little = lambda _: False
    backward(params, grads)
    with counted_measurements() as counted:
        check(clipper.clip_(), reference.total_norm(grads, norm_type))
    # No view shows complex numbers, and no sample that is zero shows a multiplication.
    never = {"complex", "complex128", "zeros", "one in many"}
    again = [1] if kind in never and not (on_device and "complex" not in kind) else []
    assert counted == again


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("norm_type", [2.0, 8.0, math.inf])
def test_without_a_wait_for_the_device(write: Callable[[Tensor], None], norm_type: float) -> None:
    """The way of accelerators, on the CPU: nothing but the backend looks at a flag."""
    kinds = [*KINDS]
    kinds.remove("infinite")
    grads = [KINDS[kind]() for kind in kinds]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    params.append(nn.Parameter(torch.zeros(3)))  # never has a gradient
    policy = distclip.ClipNorm(1e-3, norm_type)
    clipper = clipper_of(params, policy)
    clipper._held.backward._waits = False
    for changed in (range(1, len(grads)), [3], [5], [9], [13], [14], [15], [16], []):
        backward(params[:-1], grads)
        for i in changed:
            write(params[i].grad)
        report = clipper.clip_()
        assert report.clipped
        expected = distclip.Clipper(params, distclip.ClipNorm(math.inf, norm_type))
        for param in params:
            param.grad = None
        backward(params[:-1], grads)
        for i in changed:
            write(params[i].grad)
        check(report, expected.clip_().total_norm.double())
        for param in params:
            param.grad = None


@pytest.mark.parametrize("policy", [distclip.AGC(0.05), distclip.ClipTensorNorm(1e-3)], ids=str)
def test_policies_with_units(policy: Any) -> None:
    grads = [KINDS[kind]() for kind in ("matrix", "short", "embedding", "long")]
    params = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    plain = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    clipper = clipper_of(params, policy)
    backward(params, grads)
    backward(plain, grads)
    for each in (params, plain):
        each[0].grad.data.mul_(3)
        each[2].grad.data.mul_(5)
    assert clipper.clip_().clipped
    assert distclip.Clipper(plain, policy).clip_().clipped
    for param, expected in zip(params, plain, strict=True):
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-6, atol=0)


def test_any_run_of_neighbours_is_seen() -> None:
    """As many as the distance between samples, wherever they lie."""
    grad = torch.ones(3 * LONG)
    (param,) = params = [nn.Parameter(torch.zeros_like(grad))]
    clipper = clipper_of(params)
    for first in range(0, samples.FLAT_STEP + 3):
        backward(params, [grad])
        param.grad.data[LONG + first : LONG + first + samples.FLAT_STEP].mul_(100)
        expected = norm_of(params)
        check(clipper.clip_(), expected)
        param.grad = None


@pytest.mark.parametrize("width", [2, 3, 7, 64, 128, 251, 500])
def test_a_row_or_a_column_of_zeros_that_is_added_to_is_seen(width: int) -> None:
    """As an all-reduce does to the rows of an embedding that this rank's tokens did not use."""
    grad = torch.ones(600, width)
    grad[[3, 77, 599]] = 0
    (param,) = params = [nn.Parameter(torch.zeros_like(grad))]
    clipper = clipper_of(params)
    for row in (3, 77, 599):
        backward(params, [grad])
        param.grad.data[row] += 100
        expected = norm_of(params)
        check(clipper.clip_(), expected)
        param.grad = None
    for column in range(0, width, 1 + width // 60):
        backward(params, [grad])
        param.grad.data[:, column] += 100
        expected = norm_of(params)
        check(clipper.clip_(), expected)
        param.grad = None


# Loss scaling

SCALERS = [GradScaler, ShardedGradScaler]


def scaled(scaler: GradScaler, overlap: bool = True) -> tuple[nn.Module, distclip.Clipper, Tensor]:
    """A model with scaled gradients, its clipper, and the norm of the unscaled gradients."""
    model = make_model()
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), overlap=overlap)
    loss_of(model, tokens_of_all_ranks()).backward()
    norm = norm_of([*model.parameters()])
    model.zero_grad()
    scaler.scale(loss_of(model, tokens_of_all_ranks())).backward()
    return model, clipper, norm


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("way", ["clip_", "clip_ with it", "decide", "step", "attach", "step_"])
@pytest.mark.parametrize("fused", [False, True])
def test_after_unscale(way: str, overlap: bool, fused: bool) -> None:
    scaler = GradScaler("cpu", init_scale=65536.0)
    model, clipper, norm = scaled(scaler, overlap)
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    before = [p.detach().clone() for p in model.parameters()]
    attached = clipper.attach(optimizer) if way in ("attach", "step_") else None
    if way != "step_":  # scaler.step() unscales, before the hook
        scaler.unscale_(optimizer)
    report = None
    if way == "clip_":
        report = clipper.clip_()
    elif way == "clip_ with it":
        report = clipper.clip_(optimizer, scaler=scaler)
    elif way == "decide":
        decision = clipper.decide(optimizer, scaler)
        decision.apply_()
        report = decision.report
    elif way == "step":
        report = clipper.step(optimizer, scaler)
    if way != "step":
        scaler.step(optimizer)
    report = attached.report if report is None else report
    check(report, norm)
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    torch.testing.assert_close(reference.total_norm(moved), torch.tensor(MAX_NORM).double())
    scaler.update()


def test_after_a_fused_step_that_unscales() -> None:
    scaler = GradScaler("cpu", init_scale=65536.0)
    model, clipper, norm = scaled(scaler)
    scaler.step(AdamW(model.parameters(), lr=0.0, fused=True))
    check(clipper.clip_(), norm)


# Ranks


@of_any_size
def all_reduces(how: str) -> None:
    """Gradients that ranks sum themselves, after backward, with or without a flat buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 16), nn.Linear(16, 300), nn.Linear(300, 1))
    params = [*model.parameters()]
    buffer = torch.zeros(sum(p.numel() for p in params))
    clipper = clipper_of(model)
    tokens = torch.arange(20) * (dist.get_rank() + 1) + 31 * dist.get_rank()
    for _ in range(2):
        model.zero_grad()
        if how == "flat":
            buffer.zero_()
            parts = buffer.split([p.numel() for p in params])
            for param, part in zip(params, parts, strict=True):
                param.grad = part.view_as(param)
        model(tokens).square().sum().backward()
        if how == "flat":
            dist.all_reduce(buffer)
        elif how == "coalesced":
            dist.all_reduce_coalesced([p.grad for p in params])
        elif how == "one":
            dist.all_reduce(params[0].grad)
            for param in params[1:]:
                param.grad = None
        elif how == "broadcast":
            for param in params:
                dist.broadcast(param.grad, 2)
        else:
            for param in params:
                dist.all_reduce(
                    param.grad, op=dist.ReduceOp.AVG if how == "avg" else dist.ReduceOp.SUM
                )
        expected = norm_of(params)
        report = clipper.clip_()
        check(report, expected)
        assert report.clipped
        assert same_bits_everywhere(report.total_norm)


@pytest.mark.parametrize("how", ["each", "flat", "one", "broadcast"])
def test_gradients_that_the_user_reduces(four_ranks: Ranks, how: str) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(all_reduces, how)


@of_any_size
def unscaled_on_ranks(kind: str, sharded: bool) -> None:
    results: list[Tensor] = []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 300), nn.Linear(300, 30), nn.Linear(30, 1))
        if kind == "fsdp2":
            fully_shard(model, mesh=mesh((4,), ("fsdp",)))
        else:
            model = DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp, views")
        scaler = (ShardedGradScaler if sharded else GradScaler)("cpu", init_scale=65536.0)
        optimizer = SGD(model.parameters(), lr=0.1, foreach=False)
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), overlap=overlap)
        x = torch.ones(4, 40) * (dist.get_rank() + 1)
        for way in ("clip_", "step"):
            optimizer.zero_grad()
            scaler.scale(10 * model(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            report = clipper.clip_() if way == "clip_" else clipper.step(optimizer, scaler)
            if way == "clip_":
                scaler.step(optimizer)
            scaler.update()
            assert report.clipped
            results.append(report.total_norm)
        results += [local(p.detach()) for p in model.parameters()]
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sharded", [False, True], ids=["GradScaler", "ShardedGradScaler"])
@pytest.mark.parametrize("kind", ["ddp", "ddp, views", "fsdp2"])
def test_unscaled_on_ranks(four_ranks: Ranks, kind: str, sharded: bool) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(unscaled_on_ranks, kind, sharded)


@pytest.mark.parametrize("place", range(6))
def test_each_element_of_a_short_tensor_shows_on_a_device(place: int) -> None:
    tensors = [torch.ones(2), torch.ones(4)]
    taken = samples.Samples(2, torch.device("cpu"))
    taken.take([0, 1], tensors)
    assert taken.changed_on_device([0, 1]).tolist() == [False, False]
    tensor, index = (0, place) if place < 2 else (1, place - 2)
    tensors[tensor][index] = 2.0
    assert taken.changed_on_device([0, 1]).tolist() == [tensor == 0, tensor == 1]


@pytest.mark.parametrize("copy_at", [0, 64], ids=["before", "after"])
def test_no_sample_of_a_copy(monkeypatch: pytest.MonkeyPatch, copy_at: int) -> None:
    """Wherever the copy lies in memory: it would not show what is written to the gradient."""
    memory = torch.arange(96.0)
    values = memory[32:64].view(8, 4).t()
    copy = memory[copy_at : copy_at + 32].copy_(values.flatten())
    monkeypatch.setattr(samples, "flat", lambda _: copy)
    assert samples.sample(values) is None
    monkeypatch.setattr(samples, "flat", lambda _: memory[32:64])
    assert samples.sample(values) is not None
