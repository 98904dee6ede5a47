"""`Clipper(tensor_norms=...)`: the norm of every tensor, whole, beside what clips."""

from __future__ import annotations

import gc
import math
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from distclip import AGC, ClipNorm, Clipper, ClipTensorNorm, ClipValue, Layout, LayoutError, Policy
from distclip.norms import reduce
from distclip.policies import Scope
from tests.support import parallel_models, reference, wrapped
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.overlap import of_any_size
from tests.support.ranks import Ranks, device_of, mesh

POLICIES: list[Policy[Any]] = [
    ClipNorm(1e-2),
    ClipNorm(1e-2, 1.0),
    ClipNorm(1e-2, 8.0),
    ClipNorm(1e-2, math.inf),
    ClipTensorNorm(1e-2),
    ClipTensorNorm(1e-2, math.inf),
    AGC(0.01),
    ClipValue(0.1),
]
FLOAT32 = {"rtol": 3e-7, "atol": 0.0}  # what `kernels.cpu` promises, and one rounding


def names_of(params: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layers.{i}.weight", param) for i, param in enumerate(params)]


def norms_of(wholes: dict[str, Tensor], norm_type: float) -> dict[str, float]:
    return {name: reference.total_norm([whole], norm_type).item() for name, whole in wholes.items()}


def assert_norms(found: dict[str, float], expected: dict[str, float], **close: float) -> None:
    assert list(found) == list(expected)
    for name, norm in expected.items():
        assert math.isclose(found[name], norm, rel_tol=close["rtol"]), (name, found[name], norm)


def with_gradient(name: str, grad: Tensor | None, device: str = "cpu") -> tuple[str, nn.Parameter]:
    like = torch.zeros(2) if grad is None else grad
    param = nn.Parameter(torch.zeros_like(like, device=device_of(device)))
    param.grad = None if grad is None else grad.to(param.device)
    return name, param


def clipped(params: Sequence[tuple[str, nn.Parameter]], policy: Any, **options: Any) -> Any:
    """The report of one step, what is left of the gradients, and the number of collectives."""
    clipper = Clipper(params, policy, **options)
    with CommDebugMode() as comms:
        report = clipper.clip_()
    return report, [wrapped.local(p.grad).clone() for _, p in params], comms.get_total_counts()


def in_turn(turn: int) -> list[Policy[Any]]:
    """The first policy, and two of the others: each comes to two layouts or more."""
    first, *others = POLICIES
    return [first, *(others[(2 * turn + i) % len(others)] for i in range(2))]


def on_layouts(device: str) -> None:
    for turn, (layout, given) in enumerate(LAYOUTS.items()):
        placed = given[::-1] if turn % 2 else given  # copies also before what this rank counts
        for seed, policy in enumerate(in_turn(turn)):
            wholes = random_wholes(placed, seed)
            ours, plain = (names_of(lay_out(wholes, placed, device)) for _ in range(2))
            report, grads, num = clipped(ours, policy, tensor_norms=True)
            bare, bare_grads, bare_num = clipped(plain, policy)

            expected = norms_of(dict(zip(dict(ours), wholes, strict=True)), policy.norm_type)
            assert_norms(report.tensor_norms(), expected, **FLOAT32)
            assert bare.tensor_norms() == {}
            assert num == bare_num, layout
            assert all(map(torch.equal, grads, bare_grads)), layout
            assert torch.equal(report.total_norm, bare.total_norm), layout
            if policy.scope is not Scope.ELEMENT:
                assert bool(report.clipped), (layout, policy)
            dist.all_gather_object(everyone := [{}] * 4, report.tensor_norms())
            assert all(each == everyone[0] for each in everyone), (layout, policy)


def test_on_every_layout_norms_are_whole_and_nothing_else_changes(four_ranks: Ranks) -> None:
    four_ranks.run(on_layouts, four_ranks.device)


def in_wrappers(kinds: Sequence[str], device: str) -> None:
    names = [name for name, _ in wrapped.make_model().named_parameters()]
    wholes = dict(zip(names, wrapped.whole_gradients(), strict=True))
    for turn, kind in enumerate(kinds):
        for policy in (ClipNorm(1e-2), (ClipNorm(1e-2, math.inf), AGC(1e-3))[turn % 2]):
            model = wrapped.with_gradients(kind, device)
            bare = Clipper(model, policy).decide().report
            report = Clipper(model, policy, tensor_norms=True).decide().report
            assert torch.equal(report.total_norm, bare.total_norm), kind
            found = report.tensor_norms()
            # FSDP1 lists the tensors of a unit together, in its own order.
            assert sorted(found) == sorted(names), kind
            expected = norms_of(wholes, policy.norm_type)
            assert_norms({name: found[name] for name in names}, expected, rtol=2e-5)
            dist.all_gather_object(everyone := [{}] * 4, found)
            assert all(each == everyone[0] for each in everyone), kind


def test_wrapped_models_show_the_tensors_inside(four_on_cpus: Ranks) -> None:
    """Those of FSDP1's flat parameters by their own names; gradients that are `Partial`."""
    four_on_cpus.run(in_wrappers, list(wrapped.WRAPPERS), "cpu")


@of_any_size
def with_overlap(device: str) -> None:
    others = ClipNorm(1e-2, 8.0), ClipTensorNorm(1e-2), AGC(1e-3), ClipNorm(1e-2, 1.0)
    kinds = "ddp", "fsdp2", "hsdp", "fsdp1 FULL_SHARD flat"
    for kind, other in zip(kinds, others, strict=True):
        for policy in (ClipNorm(1e-2), other):
            found: list[dict[str, float]] = []
            for overlap in (False, True):
                wrap, _ = wrapped.WRAPPERS[kind]
                model = wrap(wrapped.make_model(device), device)
                clipper = Clipper(model, policy, tensor_norms=True, overlap=overlap)
                tokens = wrapped.tokens_of_all_ranks().chunk(4)[dist.get_rank()]
                wrapped.loss_of(model, tokens).backward()
                head = next(reversed(list(model.parameters())))
                if head.grad is not None:
                    head.grad = head.grad * 3  # measured anew, beside those that backward left
                found.append(clipper.clip_().tensor_norms())
            assert_norms(found[1], found[0], **FLOAT32)


def test_gradients_measured_during_backward(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(with_overlap, "cpu")


def of_stages_and_experts(device: str) -> None:
    rank, on = dist.get_rank(), mesh((2, 2), ("pp", "dp"), device)
    # Stage 0 has one tensor, stage 1 two; the second axis has copies. Every rank sees all three.
    shapes = {"stage0.0": (4, 3), "stage1.0": (2, 2), "stage1.1": (5,)}
    wholes = {name: torch.full(shape, 1.0 + i) for i, (name, shape) in enumerate(shapes.items())}
    names = [name for name in wholes if name.startswith(f"stage{rank // 2}")]
    params = [with_gradient(name, wholes[name], device) for name in names]
    for policy in POLICIES:
        report = Clipper(params, policy, mesh=on, tensor_norms=True).decide().report
        assert_norms(report.tensor_norms(), norms_of(wholes, policy.norm_type), **FLOAT32)

    # Experts: each rank of `ep` has a part of one tensor, or a tensor of its own.
    on, index = mesh((2, 2), ("dp", "ep"), device), rank % 2
    params = [with_gradient("experts.w", torch.full((3, 2), 1.0 + index), device)]
    layout = Layout(sharded={"ep"}, replicated={"dp"})
    options: dict[str, Any] = {"mesh": on, "tensor_norms": True}
    parts = Clipper(params, layouts=lambda *_: layout, **options).decide().report
    assert parts.tensor_norms() == pytest.approx({"experts.w": math.sqrt(6 * 1 + 6 * 4)})
    params.append(with_gradient(f"only{index}", torch.ones(1), device))
    apart = Clipper(params, distinct=("ep",), **options).decide().report
    one, two = math.sqrt(6 * 1), math.sqrt(6 * 4)
    expected = {"experts.w (ep 0)": one, "only0": 1.0, "experts.w (ep 1)": two, "only1": 1.0}
    assert_norms(apart.tensor_norms(), expected, **FLOAT32)
    assert apart.tensor_norms(prefix="experts") == pytest.approx(
        {"experts.w (ep 0)": one, "experts.w (ep 1)": two}
    )


def sharded_stages(device: str) -> None:
    """Both stages are sharded, and every rank sees the tensors of both."""
    model = parallel_models.make_model(parallel_models.dense_blocks)
    wholes = parallel_models.whole_gradients(model)
    on = mesh((2, 2), ("pp", "fsdp"), device)
    stage = parallel_models.stage_of(model, on.get_local_rank("pp"), 2)
    stage.zero_grad()
    sharded = parallel_models.fully_sharded(stage, on["fsdp"])
    for name, param in sharded.named_parameters():
        param.grad = torch.distributed.tensor.distribute_tensor(
            wholes[name], param.device_mesh, param.placements, src_data_rank=None
        )
    for policy in (ClipNorm(1e-3), ClipNorm(1e-3, math.inf), ClipTensorNorm(1e-3)):
        report = Clipper(sharded, policy, mesh=on, tensor_norms=True).decide().report
        found, expected = report.tensor_norms(), norms_of(wholes, policy.norm_type)
        assert sorted(found) == sorted(expected)
        assert_norms({name: found[name] for name in expected}, expected, rtol=1e-6)
        dist.all_gather_object(everyone := [{}] * 4, found)
        assert all(list(each.items()) == list(found.items()) for each in everyone)


def test_every_rank_sees_all_stages_and_experts(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(of_stages_and_experts, "cpu")
    four_on_cpus.run(sharded_stages, "cpu")


def in_turns(device: str) -> tuple[list[int], str]:
    """The numbers in the all-reduce of each of five steps; the error after a rank left out one."""
    params = names_of(lay_out(random_wholes(LAYOUTS["fsdp"], 0), LAYOUTS["fsdp"], device))
    clipper = Clipper(params, ClipNorm(0.1), tensor_norms=2)
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        send = reduce._combined

        def sent(parts: Sequence[Tensor], *rest: Any) -> Tensor:
            sizes.append(sum(map(len, parts)))
            return send(parts, *rest)

        patch.setattr(reduce, "_combined", sent)
        have = [bool(clipper.clip_().tensor_norms()) for _ in range(5)]
    assert have == [True, False, True, False, True]
    if dist.get_rank() == 1:
        clipper._calls._num_calls += 1  # as if it had left out the last call
    with pytest.raises(LayoutError, match="do not make the same call") as raised:
        clipper.clip_()
    return sizes, str(raised.value)


def test_all_calls_send_as_much_and_one_left_out_is_an_error(four_on_cpus: Ranks) -> None:
    """gloo would wait for ever for the rest of a longer message."""
    sizes, errors = zip(*four_on_cpus.run(in_turns, "cpu"), strict=True)
    assert list(sizes) == [[16] * 5] * 4
    assert len(set(errors)) == 1
    assert "ranks [1]" in errors[0]
    assert "with tensor norms" in errors[0]


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def small_model(value: float = 2.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    for param in model.parameters():
        param.grad = torch.full_like(param, value)
    return model


def test_other_steps_do_nothing_more() -> None:
    found: list[list[str]] = []
    for every in (False, 3):
        clipper = Clipper(small_model(), ClipNorm(math.inf), tensor_norms=every)
        clipper.clip_()
        with Operations() as operations:
            clipper.clip_()
        found.append(operations.names)
    assert found[0] == found[1]


def test_gradients_of_every_kind() -> None:
    """Sparse, complex, bf16, of any size, not contiguous, none; a parameter of no element."""
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    grads: dict[str, Tensor | None] = {
        "complex": torch.randn(4, dtype=torch.complex64),
        "bf16": torch.randn(300, 300).bfloat16(),
        "tiny": torch.full((3,), 1e-30),
        "huge": torch.full((3,), 1e30),
        "transposed": torch.randn(70, 1000).t(),
        "none": None,
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3.0),
    }
    params = [("embedding", embedding.weight), *(with_gradient(*each) for each in grads.items())]
    wholes = {name: torch.zeros(2) if grad is None else grad for name, grad in grads.items()}
    wholes = {"embedding": embedding.weight.grad.to_dense(), **wholes}
    for policy in (ClipNorm(0.1), ClipNorm(0.1, math.inf), ClipNorm(0.1, 3.0), ClipTensorNorm(0.1)):
        report = Clipper(params, policy, tensor_norms=True).decide().report
        assert_norms(report.tensor_norms(), norms_of(wholes, policy.norm_type), **FLOAT32)
        bare = Clipper(params, policy).decide().report
        assert torch.equal(report.total_norm, bare.total_norm)


def test_without_a_gradient_the_norm_is_zero() -> None:
    model = small_model()
    model[0].bias.grad = None
    for policy in (ClipNorm(0.1), ClipNorm(0.1, 8.0), ClipTensorNorm(0.1), AGC(0.1)):
        norms = Clipper(model, policy, tensor_norms=True).decide().report.tensor_norms()
        assert norms["0.bias"] == 0
        assert min(norms[name] for name in ("0.weight", "1.weight", "1.bias")) > 2
    for param in model.parameters():
        param.grad = None
    report = Clipper(model, tensor_norms=True).decide().report
    assert list(report.tensor_norms().values()) == [0.0] * 4


@pytest.mark.parametrize("policy", [ClipNorm(0.1), ClipTensorNorm(0.1)], ids=str)
def test_scales_are_in_the_norms(policy: Policy[Any]) -> None:
    model = small_model(value=8.0)
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    clipper = Clipper(model, policy, tensor_norms=True)
    report = clipper.step(optimizer, scaler, scale=-0.5)
    assert report.tensor_norms() == pytest.approx(
        {"0.weight": math.sqrt(2), "0.bias": 1, "1.weight": math.sqrt(2), "1.bias": math.sqrt(2)}
    )


def test_attached_and_groups_of_other_policies() -> None:
    model = small_model()
    groups = [
        {"name": "first", "params": model[0], "policy": ClipNorm(0.1, math.inf)},
        {"name": "second", "params": model[1], "policy": ClipTensorNorm(0.1)},
    ]
    clipper = Clipper(groups, tensor_norms=True)
    handle = clipper.attach(optimizer := SGD(model.parameters(), lr=0.1))
    optimizer.step()
    assert handle.report is not None
    norms = list(handle.report.tensor_norms().values())
    assert norms == pytest.approx([2, 2, math.sqrt(8), math.sqrt(8)])


def test_the_report_keeps_nothing_alive_and_pickles() -> None:
    model = small_model()
    clipper = Clipper(model, ClipNorm(0.1), tensor_norms=True)
    report = clipper.clip_()
    gone = [weakref.ref(each) for each in (model, clipper, clipper.plan, model[0].weight)]
    gc.collect()
    gc.disable()
    try:
        del model, clipper
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
    copy = pickle.loads(pickle.dumps(report))
    assert copy.tensor_norms() == report.tensor_norms()
    assert len(report.tensor_norms()) == 4


def test_parameters_that_come_later_are_measured_too() -> None:
    model = small_model()
    clipper = Clipper(model, tensor_norms=True)
    clipper.clip_()
    model.append(nn.Linear(2, 1))
    for param in model.parameters():
        param.grad = torch.full_like(param, 2.0)
    assert clipper.clip_().tensor_norms()["2.weight"] == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, "2", None, [2]])
def test_what_is_no_number_of_steps(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="tensor_norms"):
        Clipper(small_model(), tensor_norms=value)
