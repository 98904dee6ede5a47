"""Ranks that do not make the same call find it in that call, all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import AGC, AutoClip, ClipNorm, Clipper, ClipTensorNorm, ClipValue, LayoutError, ZClip
from distclip.norms import agreement, late_reads, reduce
from distclip.norms.agreement import HEADER_SIZE, Header, decode, encode, message_size, policy_text
from distclip.norms.late_reads import Late
from distclip.norms.measure import measure
from distclip.sharding import failures
from tests.support.ranks import Ranks, device_of, mesh


def sharded(device: str, seed: int = 0, size: int = 8) -> nn.Parameter:
    """A parameter of which each of four ranks has a quarter, with a gradient of norm 10."""
    on = mesh((4,), ("dp",), device)
    torch.manual_seed(seed)
    whole = torch.randn(size, 3)
    whole *= 10 / whole.norm()
    param = nn.Parameter(
        distribute_tensor(torch.zeros(size, 3).to(device_of(device)), on, [Shard(0)])
    )
    param.grad = distribute_tensor(whole.to(device_of(device)), on, [Shard(0)])
    return param


def is_odd() -> bool:
    return dist.get_rank() == 2


Call = Callable[[str], Any]


def two_clippers(device: str) -> None:
    """The same two on every rank; one rank calls them the other way round."""
    clippers = [Clipper([("a", sharded(device))]), Clipper([("b", sharded(device, 1))])]
    clippers[is_odd()].clip_()


def two_clippers_of_other_policies(device: str) -> None:
    param = sharded(device)
    clippers = [Clipper([param], ClipNorm(1.0)), Clipper([param], ClipNorm(1.0, math.inf))]
    clippers[is_odd()].clip_()


def with_policy(usual: Any, odd: Any) -> Call:
    return lambda device: Clipper([sharded(device)], odd if is_odd() else usual).clip_()


def with_option(**options: tuple[Any, Any]) -> Call:
    def call(device: str) -> None:
        Clipper([sharded(device)], **{k: v[is_odd()] for k, v in options.items()}).clip_()

    return call


def grouped(device: str) -> None:
    groups = [
        {"name": "a", "params": [sharded(device)]},
        {"name": "b", "params": [sharded(device, 1)]},
    ]
    Clipper(groups[::-1] if is_odd() else groups).clip_()


def function(usual: dict[str, Any], odd: dict[str, Any]) -> Call:
    def call(device: str) -> None:
        distclip.clip_grad_norm_([sharded(device)], **(odd if is_odd() else usual))

    return call


def two_functions(device: str) -> None:
    param = sharded(device)
    if is_odd():
        distclip.get_total_norm([param.grad])
    else:
        distclip.clip_grad_norm_([param], 1.0)


def left_out(device: str) -> None:
    param = sharded(device)
    clipper = Clipper([param])
    for step in range(3):
        if not (is_odd() and step == 1):
            clipper.clip_(step=step)
    if is_odd():
        clipper.clip_(step=3)


def once_more(device: str) -> None:
    param = sharded(device)
    clipper = Clipper([param])
    optimizer = torch.optim.SGD([param], lr=0.1)
    clipper.step(optimizer, step=0)
    if is_odd():
        clipper.decide(step=0)
    clipper.step(optimizer, step=1)


def named(*names: str, policy: Any = ClipNorm(1.0)) -> Clipper:  # noqa: B008 - frozen
    params = [sharded("cpu", i) for i in range(20)]
    return Clipper([*zip(names, params, strict=False)], policy)


def longer_message(usual: Any, odd: Any) -> Call:
    """One of the two has a number for each tensor."""
    names = [f"p{i}" for i in range(20)]
    return lambda _: named(*names, policy=odd if is_odd() else usual).clip_()


def sums_and_maxima(device: str) -> None:
    """An all-gather on one rank, an all-reduce on the others."""
    policies = ClipNorm(1.0), ClipNorm(1.0, math.inf)
    groups = [
        {"name": name, "params": [sharded(device, i)], "policy": policies[is_odd() and i]}
        for i, name in enumerate("ab")
    ]
    Clipper(groups).clip_()


DIFFERENT: dict[str, Call] = {
    "a longer message": longer_message(ClipNorm(1.0), ClipTensorNorm(1.0)),
    "a shorter message": longer_message(ClipTensorNorm(1.0), ClipNorm(1.0)),
    "a longer message, p = inf": longer_message(
        ClipNorm(1.0, math.inf), ClipTensorNorm(1.0, math.inf)
    ),
    "sums and maxima": sums_and_maxima,
    "parameters": lambda _: named(*"ab", *"c"[is_odd() :]).clip_(),
    "the order of parameters": lambda _: named(*("ba" if is_odd() else "ab")).clip_(),
    "limit": with_policy(ClipNorm(1.0), ClipNorm(1.0001)),
    "p": with_policy(ClipNorm(1.0), ClipNorm(1.0, 3.0)),
    "p in bins": with_policy(ClipNorm(1.0), ClipNorm(1.0, 8.0)),
    "p = inf": with_policy(ClipNorm(1.0), ClipNorm(1.0, math.inf)),
    "p = inf on most": with_policy(ClipNorm(1.0, math.inf), ClipNorm(1.0)),
    "limit, p = inf": with_policy(ClipNorm(1.0, math.inf), ClipNorm(2.0, math.inf)),
    "policy": with_policy(ZClip(), AutoClip()),
    "a field of a policy": with_policy(ZClip(), ZClip(alpha=0.9)),
    "values": with_policy(ClipValue(1.0), ClipValue(2.0)),
    "units": with_policy(AGC(0.1), AGC(0.2)),
    "tensors": with_policy(ClipTensorNorm(1.0), ClipTensorNorm(2.0)),
    "combined": with_policy(ZClip() & ClipNorm(1.0), ZClip() & ClipNorm(2.0)),
    "on_nonfinite": with_option(on_nonfinite=("skip", "zero")),
    "max_consecutive_skips": with_option(
        on_nonfinite=("skip", "skip"), max_consecutive_skips=(20, 3)
    ),
    "tensor_norms": with_option(tensor_norms=(False, True)),
    "tensor_norms on most": with_option(tensor_norms=(True, False)),
    "tensor_norms, other steps": with_option(tensor_norms=(2, 3)),
    "tensor_norms and p = inf": with_option(
        policy=(ClipNorm(1.0, math.inf), ClipNorm(1.0, math.inf)), tensor_norms=(True, False)
    ),
    "groups": grouped,
    "two clippers": two_clippers,
    "two clippers, p = inf": two_clippers_of_other_policies,
    "function": function({"max_norm": 1.0}, {"max_norm": 2.0}),
    "function, p": function({"max_norm": 1.0}, {"max_norm": 1.0, "norm_type": 1.0}),
    "two functions": two_functions,
    "a call left out": left_out,
    "a call once more": once_more,
}


def raises_together(name: str, device: str) -> str:
    with pytest.raises(LayoutError, match="do not make the same call") as caught:
        DIFFERENT[name](device)
    # The ranks are still in step: no collective has been left without its partners.
    dist.barrier()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 4
    return str(caught.value)


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_make_different_calls_raise_together(four_on_cpus: Ranks, name: str) -> None:
    texts = set(four_on_cpus.run(raises_together, name, "cpu"))
    assert len(texts) == 1
    (text,) = texts
    assert "ranks [0, 1, 3]" in text
    assert "ranks [2]" in text


DIFFERENCES = {
    "limit": "ranks [0, 1, 3]: all: ClipNorm(max_norm=1.0, norm_type=2.0); "
    "ranks [2]: all: ClipNorm(max_norm=1.0001, norm_type=2.0))",
    "a call left out": "(ranks [0, 1, 3]: step=1; ranks [2]: step=2)",
    "on_nonfinite": "(ranks [0, 1, 3]: on_nonfinite=skip, max_consecutive_skips=20; ranks [2]: on",
    "parameters": "the ranks [2] do not have 'c'",
    "the order of parameters": "parameter 0 is rank 0: 'a', rank 1: 'a', rank 2: 'b', rank 3: 'a'",
    "a longer message": "ranks [2]: all: ClipTensorNorm(max_norm=1.0, norm_type=2.0)",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_error_names_what_differs(four_on_cpus: Ranks, name: str) -> None:
    (text,) = set(four_on_cpus.run(raises_together, name, "cpu"))
    assert DIFFERENCES[name] in text


def test_what_differs_is_shown_without_what_all_say() -> None:
    beside = "; ".join(f"group {i}: ClipNorm(max_norm=1.0)" for i in range(50))
    found = failures.by_text(
        {0: f"{beside}; step=1", 1: f"{beside}; step=1", 2: f"{beside}; step=2"}
    )
    assert found == "ranks [0, 1]: step=1; ranks [2]: step=2"
    assert failures.by_text({0: "a; b", 1: "b; a"}) == "ranks [0]: a; b; ranks [1]: b; a"


class Halving(distclip.PolicyBase):
    """A policy of the user: no dataclass, so that its text holds an address."""

    scope = distclip.Scope.MODEL
    norm_type = 2.0

    def init(self, num_groups: int, device: torch.device) -> Any:
        return distclip.policies.EmptyState()

    def limit(self, norms: torch.Tensor, state: Any, context: Any) -> Any:
        return norms / 2, state


def same_calls(device: str) -> None:
    """What may differ between ranks that agree: objects, modules and names of pipeline stages."""
    rank = dist.get_rank()
    param = sharded(device)
    keep = [object() for _ in range(rank)]  # other addresses on every rank
    report = Clipper([param], Halving()).clip_(step=7)
    torch.testing.assert_close(report.total_norm.item(), 10.0, rtol=1e-6, atol=0)
    del keep
    stages = mesh((4,), ("pp",), device)
    plain = nn.Linear(3, 1 + rank).to(device_of(device))
    plain.weight.grad = torch.full_like(plain.weight, 1.0 + rank)
    expected = math.sqrt(sum(3 * (1 + r) * (1 + r) ** 2 for r in range(4)))
    for policy in (ClipNorm(1e9), AGC(0.1, exclude=(plain,))):
        clipper = Clipper(
            [(f"stage{rank}.{n}", p) for n, p in plain.named_parameters()], policy, mesh=stages
        )
        torch.testing.assert_close(clipper.clip_().total_norm.item(), expected, rtol=1e-6, atol=0)


def test_what_may_differ_between_ranks_that_agree(four_ranks: Ranks) -> None:
    four_ranks.run(same_calls, four_ranks.device)


def combined(headers: list[Header], is_max: bool = False) -> list[float]:
    """What the ranks' headers become in the all-reduce."""
    rows = torch.tensor([header.numbers(is_max) for header in headers], dtype=torch.float64)
    return (rows.amax(0) if is_max else rows.sum(0)).tolist()


@pytest.mark.parametrize("is_max", [False, True])
@pytest.mark.parametrize("others", ["", "call"])
def test_a_header_is_a_sum_or_a_maximum_of_all_ranks(is_max: bool, others: str) -> None:
    for num_ranks in (1, 2, 3, 1 << 14):
        mine = Header("call", "0: Partial")
        headers = [mine] * (num_ranks - 1) + [Header(others or "other", "0: Partial")]
        if num_ranks == 1:
            mine = Header(others or "other", "0: Partial")
        answer = decode(combined(headers, is_max), mine, is_max, num_ranks)
        assert answer.agrees == (others == "call" or num_ranks == 1)
        assert answer.alike
        assert answer.unreduced
        assert not answer.missing
        assert not answer.fault


@pytest.mark.parametrize("text", ["a", "b", "c"])
def test_tags_whose_mean_is_another_tag_are_found(text: str) -> None:
    mine = Header(text)
    header = torch.tensor(mine.numbers(False), dtype=torch.float64)
    tag = header[0].item()
    others = [header.clone(), header.clone()]
    for other, wrong in zip(others, (tag - 1, tag + 1), strict=True):
        other[:2] = torch.tensor([wrong, wrong**2])
    assert not decode((header + sum(others)).tolist(), mine, False, 3).agrees
    assert decode((3 * header).tolist(), mine, False, 3).agrees


def test_usual_calls_have_messages_of_one_size() -> None:
    """gloo waits for ever where ranks send other sizes; where only tags differ, all learn it."""
    assert {message_size([size]) for size in (1, 2)} == {8}
    assert message_size([3]) == 16
    assert HEADER_SIZE == 6


def test_the_text_of_a_policy_has_its_numbers_and_no_address() -> None:
    assert (
        policy_text(ClipNorm(1))
        == policy_text(ClipNorm(1.0))
        == ("ClipNorm(max_norm=1.0, norm_type=2.0)")
    )
    assert policy_text(ClipNorm(1.0) & ZClip()) != policy_text(ClipNorm(1.0) & ZClip(alpha=0.5))
    assert policy_text(Halving()) == policy_text(Halving()) == "Halving()"
    assert "Linear" not in policy_text(AGC(exclude=(nn.Linear(1, 1),)))


def read_without_a_look(monkeypatch: pytest.MonkeyPatch, *headers: Header) -> tuple[Any, bool]:
    """What the first of two ranks learns on a device whose numbers come late: here at once."""
    plan = Clipper([nn.Parameter(torch.zeros(1))]).plan
    plan.calls.is_settled = True
    monkeypatch.setattr(reduce, "host_has_values", lambda tensor: False)
    first = torch.tensor(combined([*headers]), dtype=torch.float64)
    is_wrong = encode(headers[0], False, len(headers), 2, first).is_wrong(first)
    return reduce._read(first, plan, headers[0], False, len(headers)), bool(is_wrong)


@pytest.mark.parametrize(
    ("other", "is_wrong"),
    [
        (Header("call"), False),
        (Header("call", missing=True), False),  # an expert without tokens
        (Header("call", fault=True), True),
        (Header("call", unreduced="0: Partial"), True),
    ],
)
def test_what_is_an_error_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, other: Header, is_wrong: bool
) -> None:
    flags, wrong = read_without_a_look(monkeypatch, Header("call"), other)
    assert flags.fault == wrong == is_wrong
    assert not flags.reduce_gradients


def test_another_call_is_an_error_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "disagreement", lambda plan, call: LayoutError("another call"))
    with pytest.raises(LayoutError, match="another call"):
        read_without_a_look(monkeypatch, Header("call"), Header("other"))


def launches_of_a_step(clipper: Clipper, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `total_norms` runs where nobody looks, as on an accelerator."""
    plan = clipper.plan
    gradients = [param.param.grad for param in plan.params]
    measured = measure([g.to_local() for g in gradients], plan)
    monkeypatch.setattr(reduce, "host_has_values", lambda tensor: False)
    monkeypatch.setattr(reduce, "_norms", lambda *args: None)
    with Operations() as operations:
        reduce.total_norms(measured, plan, Header("call"))
    return operations.names


class Operations(TorchDispatchMode):
    """The operations that take a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def few_launches(device: str) -> None:
    for policy in (ClipNorm(1.0), ClipNorm(1.0, math.inf)):
        with pytest.MonkeyPatch.context() as patch:
            clipper = Clipper([sharded(device)], policy)
            launches_of_a_step(clipper, patch)
            names = launches_of_a_step(clipper, patch)
        assert names == ["cat", "allreduce_", "ne", "any", "masked_fill"], names


def test_few_operations_surround_the_all_reduce(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(few_launches, "cpu")


def test_a_header_is_uploaded_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[torch.Tensor] = []
    upload = agreement.upload
    monkeypatch.setattr(agreement, "upload", lambda *args: uploads.append(args[0]) or upload(*args))
    agreement._kept.cache_clear()
    like = torch.zeros(3)
    first = encode(Header("call"), False, 4, 2, like)
    with torch.inference_mode():
        assert encode(Header("call"), False, 4, 2, like) is first
    assert len(uploads) == 1
    assert first.header.tolist() == Header("call").numbers(False)
    assert first.filling.tolist() == [0, 0]
    others = [
        encode(Header("call", fault=True), False, 4, 2, like),
        encode(Header("call"), True, 4, 2, like),
        encode(Header("call"), False, 8, 2, like),
        encode(Header("call"), False, 4, 3, like),
    ]
    assert all(other is not first for other in others)
    for step in range(100):
        encode(Header(f"call, step {step}"), False, 4, 2, like)
    assert agreement._kept.cache_info().currsize <= 32
    monkeypatch.setattr(agreement, "_stream", lambda device: "another stream")
    assert encode(Header("call"), False, 4, 2, like) is not first
    monkeypatch.setattr(agreement, "is_capturing", lambda device: True)
    captured = [encode(Header("call"), False, 4, 2, like) for _ in range(2)]
    assert captured[0] is not captured[1]  # the graph keeps its own


def test_a_header_without_values_is_not_kept() -> None:
    agreement._kept.cache_clear()
    for like in (torch.zeros(2, device="meta"), FakeTensorMode().from_tensor(torch.zeros(2))):
        assert encode(Header("call"), False, 4, 2, like).header.device == like.device
    assert agreement._kept.cache_info().currsize == 0


def test_a_late_header_is_compared_with_that_of_its_own_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `step=` the header of each step is another."""
    plan = Clipper([nn.Parameter(torch.zeros(1))]).plan
    monkeypatch.setattr(reduce, "host_has_values", lambda tensor: False)
    monkeypatch.setattr(reduce, "disagreement", lambda plan, call: LayoutError(call))
    queue: list[Late] = []

    def read_all(numbers: torch.Tensor, about: Header) -> Late | None:
        queue.append(Late(numbers.tolist(), about))
        return queue.pop(0) if len(queue) > 4 else None

    monkeypatch.setattr(plan.calls.late, "read_all", read_all)
    for step in range(8):
        mine = Header(f"step {step}")
        other = Header("step 0" if step == 3 else mine.text)
        first = torch.tensor(combined([mine, other]), dtype=torch.float64)
        if step == 3 + 4:
            with pytest.raises(LayoutError):
                reduce._read(first, plan, mine, False, 2)
        else:
            assert not reduce._read(first, plan, mine, False, 2).fault


def test_nobody_looks_inside_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(Clipper([nn.Parameter(torch.zeros(1))]).plan, copied_dtensors=[0])
    monkeypatch.setattr(reduce, "host_has_values", lambda tensor: False)
    for module in (reduce, late_reads):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    first = torch.tensor(combined([Header("call"), Header("other")]), dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    flags = reduce._read(first, plan, Header("call"), False, 2)
    assert flags == (False, True, False)
