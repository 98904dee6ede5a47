"""Parameter groups with policies of their own, and states that survive a change of ranks and
layout.
"""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipNorm,
    Clipper,
    ClipTensorNorm,
    ClipValue,
    ZClip,
)
from distclip.sharding import FlatShard
from tests.support import reference
from tests.support.layouts import LAYOUTS, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, mesh, same_bits_everywhere
from tests.support.wrapped import WRAPPERS, local, make_model, whole_gradients, with_gradients

NORM = {"rtol": 1e-6, "atol": 0.0}


def groups_share_one_collective(device: str) -> None:
    for layout in ("fsdp", "fsdp x tp", "two meshes", "beside plain"):
        placed = LAYOUTS[layout]
        wholes = random_wholes(placed, seed=3)
        for second, third in (
            (ClipTensorNorm(0.3), ClipNorm(0.2)),
            (ClipNorm(0.1, 1.0), AGC(0.01)),
            (ClipNorm(0.1, math.inf), ClipValue(0.05)),  # sums and maxima in one
        ):
            params = lay_out(wholes, placed, device)
            groups = [
                {"params": params[:1], "name": "first"},
                {"params": params[1:2], "policy": second, "name": "second"},
                {"params": params[2:], "policy": third},
            ]
            clipper = Clipper(groups, ClipNorm(0.5))
            with CommDebugMode() as comms:
                report = clipper.clip_()
            assert comms.get_total_counts() == 1
            assert list(report.norms) == ["first", "second", "group2"]
            assert bool(report.clipped)
            want = reference.total_norm(wholes[:1])
            torch.testing.assert_close(report.norms["first"].cpu().double(), want, **NORM)
            want = reference.total_norm(wholes[1:2], second.norm_type)
            torch.testing.assert_close(report.norms["second"].cpu().double(), want, **NORM)
            clipped = reference.clip_norm(wholes[:1], 0.5)[0].float()
            torch.testing.assert_close(whole(params[0].grad), clipped, rtol=2e-7, atol=0)
            assert all(same_bits_everywhere(norm) for norm in report.norms.values())


def test_groups_share_one_collective(four_ranks: Ranks) -> None:
    four_ranks.run(groups_share_one_collective, four_ranks.device)


def test_a_parameter_belongs_to_one_group() -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"'b': .*earlier group"):
        Clipper([{"params": [param], "name": "a"}, {"params": [param], "name": "b"}])
    with pytest.raises(ValueError, match=r"'a': its name is that of an earlier group"):
        Clipper(
            [
                {"params": [param], "name": "a"},
                {"params": [nn.Parameter(torch.zeros(1))], "name": "a"},
            ]
        )


def test_exclude_leaves_out_by_name_and_by_module() -> None:
    for exclude in (("head",), ("head.*",), ("*.weight", "head.bias"), "module"):
        model = make_model()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        policy = AGC(0.001, exclude=(model.head,) if exclude == "module" else exclude)
        Clipper(model, policy).clip_()
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.blocks[0].up.bias.grad.norm() < 0.1
    with pytest.raises(ValueError, match=r"'haed'.*'head\.\*'"):
        Clipper(make_model(), AGC(0.001, exclude=("haed",)))


ZCLIP = ZClip(2.0, 0.9, 3, 50.0)
ADAPTIVE = [AutoClip(30.0, history=6), ZCLIP, AdaGC(1.05, 30.0, 0.9, 3), ClipNorm(20.0) & ZCLIP]
ADAPTIVE += [AdaGN(), AGGC(0.8, 1.2, 0.7, max_down=0.5)]


def gradients_of(step: int) -> list[Tensor]:
    """The whole gradients of a step; the fifth has a spike, the seventh a NaN."""
    generator = torch.Generator().manual_seed(step)
    scale = 30.0 if step == 4 else 1.0
    grads = [scale * torch.randn(g.shape, generator=generator) for g in whole_gradients()]
    if step == 6:
        grads[0].view(-1)[0] = math.nan
    return grads


def fill(model: nn.Module, clipper: Clipper, step: int) -> None:
    """Puts this rank's elements of the step's gradients where the model's own lie."""
    grads = dict(
        zip((n for n, _ in make_model().named_parameters()), gradients_of(step), strict=True)
    )
    for held in clipper.plan.params:
        grad = held.param.grad
        if grad is None:
            continue
        local(grad).zero_()  # the padding too: a NaN of an earlier step
        for part in held.shards:
            values, piece = local(grad), part.shard
            if isinstance(piece, FlatShard):
                run = grads[part.name].reshape(-1)[piece.start : piece.start + piece.numel]
                values.view(-1)[piece.offset : piece.offset + piece.numel] = run
            elif values.numel():
                box = tuple(
                    slice(s, s + n) for s, n in zip(piece.offsets, piece.sizes, strict=True)
                )
                values.copy_(grads[part.name][box])


def run(
    kind: str, policy: distclip.Policy, saved: bytes | None = None
) -> tuple[list[float], bytes]:
    """Limits of steps 0..9, or of 5..9 from a saved state; and the state after step 4."""
    model = with_gradients(kind, "cpu") if kind != "whole" else make_model()
    if kind == "whole":
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
    clipper = Clipper(model, policy)
    distclip.clip_grad_norm_(model, math.inf)  # reduces Partial gradients
    if saved is not None:
        clipper.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
    numbers: list[float] = []
    file = io.BytesIO()
    for step in range(5 if saved is not None else 0, 10):
        fill(model, clipper, step)
        report = clipper.clip_()
        numbers += [report.coefficient.item(), report.total_norm.item()]
        if step == 4:
            torch.save(clipper.state_dict(), file)
    return numbers, file.getvalue()


@pytest.mark.parametrize("policy", ADAPTIVE, ids=lambda p: type(p).__name__)
def test_states_go_from_any_layout_to_any_other(
    four_on_cpus: Ranks, policy: distclip.Policy
) -> None:
    alone, state = run("whole", policy)
    assert min(alone[::2]) < 0.9  # it clips
    for kind in ("fsdp1 FULL_SHARD flat", "fsdp2", "hsdp"):
        sharded = four_on_cpus.run(run, kind, policy)
        assert all(str(numbers) == str(sharded[0][0]) for numbers, _ in sharded)  # NaN too
        torch.testing.assert_close(sharded[0][0], alone, rtol=1e-6, atol=0, equal_nan=True)
        resumed, _ = run("whole", policy, sharded[0][1])
        torch.testing.assert_close(resumed, alone[10:], rtol=1e-6, atol=0, equal_nan=True)
        for numbers, _ in four_on_cpus.run(run, kind, policy, sharded[0][1]):
            assert str(numbers) == str(sharded[0][0][10:])  # resumes to the same bits
    assert str(run("whole", policy, state)[0]) == str(alone[10:])


def test_a_step_that_is_not_finite_changes_no_statistic() -> None:
    for policy in ADAPTIVE:
        param = nn.Parameter(torch.zeros(3))
        clipper = Clipper([param], policy)
        for step in range(6):
            param.grad = torch.full((3,), 1.0 + step)
            clipper.clip_()
        before = str(clipper.state_dict())
        for value in (math.nan, math.inf):
            param.grad = torch.tensor([1.0, value, 1.0])
            clipper.clip_()
        assert str(clipper.state_dict()) == before


def through_a_checkpoint(folder: str) -> None:
    model = with_gradients("fsdp2", "cpu")
    clipper, fresh = (Clipper(model, AdaGC(warmup_steps=2)) for _ in range(2))
    for step in range(4):
        fill(model, clipper, step)
        clipper.clip_()
    dcp.save({"clipper": clipper}, checkpoint_id=folder)
    dcp.load({"clipper": fresh}, checkpoint_id=folder)
    assert str(fresh.state_dict()) == str(clipper.state_dict())
    assert dist.get_rank() >= 0


def test_states_go_through_torch_distributed_checkpoint(four_on_cpus: Ranks, tmp_path) -> None:
    four_on_cpus.run(through_a_checkpoint, str(tmp_path / "checkpoint"))


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    named = [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(2)))]
    for _, param in named:
        param.grad = torch.ones(2)
    clipper = Clipper(named, AdaGC())
    clipper.clip_()
    state = clipper.state_dict()
    leaves = state["groups"]["all"]["AdaGC"].values()
    assert all(isinstance(leaf, Tensor | dict) for leaf in leaves)
    others = {
        "version": (Clipper(named, AdaGC()), {**state, "version": 99}),
        "policy": (Clipper(named, ZClip()), state),
        "no 'c'": (Clipper([*named, ("c", nn.Parameter(torch.zeros(1)))], AdaGC()), state),
        "group 'x'": (Clipper([{"params": named, "name": "x"}], AdaGC()), state),
        "shape": (
            Clipper(named, AutoClip(history=5)),
            Clipper(named, AutoClip(history=7)).state_dict(),
        ),
    }
    for word, (other, wrong) in others.items():
        before = str(other.state_dict())
        with pytest.raises(ValueError, match=rf"{word}.*Nothing was loaded"):
            other.load_state_dict(wrong)
        assert str(other.state_dict()) == before


def stages_of_tensors() -> None:
    """Pipeline stages of plain tensors, with different tensors and numbers of tensors, have slots
    of their own.
    """
    stages = mesh((4,), ("pp",))
    rank = dist.get_rank()
    params = [nn.Parameter(torch.zeros(3)) for _ in range(rank + 1)]
    for place, param in enumerate(params):
        param.grad = torch.full((3,), float(rank + place + 1))
    clipper = Clipper(params, ClipTensorNorm(0.5), mesh=stages)
    with CommDebugMode() as comms:
        report = clipper.clip_()
    assert comms.get_total_counts() == 1
    everything = [torch.full((3,), float(r + i + 1)) for r in range(4) for i in range(r + 1)]
    torch.testing.assert_close(report.total_norm.double(), reference.total_norm(everything), **NORM)
    for param in params:
        torch.testing.assert_close(param.grad.norm().item(), 0.5)


def stages_of_shards() -> None:
    """The norms of sharded tensors travel, in slots of their stage: two tensors on the first, three
    on the second.
    """
    both = mesh((2, 2), ("pp", "fsdp"))
    stage = both["pp"].get_local_rank()
    params = []
    for place in range(2 + stage):
        param = nn.Parameter(
            # torch's cache gives a tensor the mesh of an equal one, whose root may be another: a
            # shape that no other test has.
            distribute_tensor(torch.zeros(26), both["fsdp"], [Shard(0)], src_data_rank=None)
        )
        param.grad = torch.full_like(param, 1.0 + 2 * stage + place)
        params.append(param)
    clipper = Clipper(params, ClipTensorNorm(0.5))
    with CommDebugMode() as comms:
        clipper.clip_()
    assert comms.get_total_counts() == 1
    for param in params:
        torch.testing.assert_close(param.grad.to_local().norm().item(), 0.5 / 2**0.5)


def test_pipeline_stages_have_units_of_their_own(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(stages_of_tensors)
    four_on_cpus.run(stages_of_shards)


def test_every_wrapper_has_the_names_of_the_bare_model(four_on_cpus: Ranks) -> None:
    names = [name for name, _ in make_model().named_parameters()]
    for kind in WRAPPERS:
        assert sorted(four_on_cpus.run(names_in, kind)[0]) == sorted(names), kind


def names_in(kind: str) -> list[str]:
    plan = Clipper(with_gradients(kind, "cpu"), ClipTensorNorm(1.0)).plan
    return [part.name for held in plan.params for part in held.shards]


def test_an_error_in_the_last_group_comes_before_the_first_is_scaled_or_counted() -> None:
    plain, complex_ = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, dtype=torch.cfloat))
    plain.grad, complex_.grad = torch.ones(4), torch.ones(4, dtype=torch.cfloat)
    groups = [
        {"name": "a", "params": [plain], "policy": distclip.ZClip(max_norm=0.5)},
        {"name": "b", "params": [complex_], "policy": distclip.ClipValue(0.1)},
    ]
    clipper = distclip.Clipper(groups)
    with pytest.raises(ValueError, match="complex"):
        clipper.clip_()
    assert torch.equal(plain.grad, torch.ones(4))
    assert clipper.state_dict()["groups"]["a"]["ZClip"]["num_steps"] == 0


def test_listed_parameters_have_their_names_in_the_modules() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(3, 1)
    listed = [first.weight, second.weight]
    clipper = distclip.Clipper(listed, distclip.ClipTensorNorm(1.0), modules=first)
    assert [param.name for param in clipper.plan.params] == ["weight", "#1"]
    clipper = distclip.Clipper(listed, distclip.ClipTensorNorm(1.0), modules=[first, second])
    assert [param.name for param in clipper.plan.params] == ["0.weight", "1.weight"]
    named = [("mine", first.weight), ("bias", first.bias)]
    clipper = distclip.Clipper(named, modules=first)
    assert [param.name for param in clipper.plan.params] == ["mine", "bias"]
