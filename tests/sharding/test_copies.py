"""Axes that nothing speaks of: what would count as copies is compared when the plan is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.support import reference
from tests.support.ranks import Ranks, mesh, same_bits_everywhere

AXES = ("ep", "fsdp")


class Mixed(nn.Module):
    """A dense layer on the whole mesh, and an expert of each rank along ep, sharded over fsdp."""

    def __init__(self, expert_seed: int, scale: float = 1.0) -> None:
        super().__init__()
        on = mesh((2, 2), AXES)
        torch.manual_seed(1)
        self.dense = nn.Linear(6, 4)
        fully_shard(self.dense, mesh=on)  # copies over ep, as the DTensors themselves say
        torch.manual_seed(expert_seed)
        self.experts = nn.Linear(6, 4)
        fully_shard(self.experts, mesh=on["fsdp"])
        generator = torch.Generator().manual_seed(7)
        for name, param in self.named_parameters():
            grad = torch.randn(param.shape, generator=generator)
            grad = grad * scale if name.startswith("experts") else grad
            placed = distribute_tensor(
                grad, param.device_mesh, param.placements, src_data_rank=None
            )
            param.grad = placed


def here() -> int:
    return mesh((2, 2), AXES)["ep"].get_local_rank()


def total(model: Mixed) -> Tensor:
    """The norm of the dense weights and of both experts; float64."""
    of_expert = [p.grad.full_tensor().double() for p in model.experts.parameters()]
    everyone: list[Any] = [None] * 4
    dist.all_gather_object(everyone, of_expert)
    dense = [p.grad.full_tensor().double() for p in model.dense.parameters()]
    return reference.total_norm([*dense, *everyone[0], *everyone[2]])


def over_ep(name: str, param: Tensor) -> distclip.Layout | None:
    return distclip.Layout(sharded={"ep"}) if name.startswith("experts.") else None


CALLS: dict[str, Callable[..., Any]] = {
    "Clipper": lambda model, **how: (
        distclip.Clipper(model, distclip.ClipNorm(1e9), **how).clip_().total_norm
    ),
    "Clipper of a list": lambda model, **how: (
        distclip.Clipper(list(model.named_parameters()), distclip.ClipNorm(1e9), **how)
        .clip_()
        .total_norm
    ),
    "clip_grad_norm_": lambda model, **how: distclip.clip_grad_norm_(model, 1e9, **how),
    "clip_grad_norm_ of a list": lambda model, **how: distclip.clip_grad_norm_(
        list(model.named_parameters()), 1e9, **how
    ),
    "get_total_norm": distclip.get_total_norm,
}


def experts_that_nobody_declared(call: str) -> list[str]:
    model = Mixed(expert_seed=10 + here(), scale=1.0 + here())
    said: list[str] = []
    for _ in range(2):  # a call that raised leaves nothing behind
        with pytest.raises(distclip.LayoutError, match=r"\['ep'\].*sharded=\{'ep'\}") as caught:
            CALLS[call](model)
        said.append(str(caught.value))
    # What the error advises gives the right norm.
    expected = total(model).float()
    for how in ({"layouts": over_ep}, {"distinct": ("ep",)}):
        norm = CALLS[call](model, **how)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        assert same_bits_everywhere(norm)
    return said


@pytest.mark.parametrize("call", CALLS)
def test_experts_that_nobody_declared_are_an_error(four_on_cpus: Ranks, call: str) -> None:
    said = four_on_cpus.run(experts_that_nobody_declared, call)
    assert len({text for texts in said for text in texts}) == 1
    assert "'experts." in said[0][0]


def gradients_that_nobody_declared() -> None:
    model = Mixed(expert_seed=10 + here(), scale=1.0 + here())
    grads = [param.grad for param in model.parameters()]
    with pytest.raises(distclip.LayoutError, match=r"its values differ.*rank 0.*rank 2"):
        distclip.get_total_norm(grads)
    norm = distclip.get_total_norm(grads, distinct=("ep",))
    torch.testing.assert_close(norm, total(model).float(), rtol=1e-6, atol=0)


def test_gradients_that_nobody_declared_are_an_error(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(gradients_that_nobody_declared)


def equal_experts_with_other_gradients() -> None:
    """Experts that begin alike, as after upcycling, show in their gradients."""
    model = Mixed(expert_seed=10, scale=1.0 + here())
    distclip.Clipper(model)  # there are only parameters to compare
    with pytest.raises(distclip.LayoutError, match="its gradients differ"):
        distclip.clip_grad_norm_(model, 1.0)


def test_equal_experts_show_in_their_gradients(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(equal_experts_with_other_gradients)


def plain_tensors_on_a_mesh() -> None:
    """Sharded by hand over tp, and nothing but the mesh was passed."""
    on = mesh((2, 2), ("dp", "tp"))
    torch.manual_seed(on["tp"].get_local_rank())
    model = nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.ones(4, 4)
    for call in CALLS.values():
        with pytest.raises(distclip.LayoutError, match=r"axes \['tp'\] .*its values differ"):
            call(model, mesh=on)
        norm = call(model, mesh=on, layouts=lambda name, param: distclip.Layout(sharded={"tp"}))
        assert norm == torch.tensor(32.0).sqrt()


def test_plain_tensors_that_differ_are_an_error(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(plain_tensors_on_a_mesh)


def copies(perturb: Callable[[Tensor], object] = lambda weight: None) -> list[nn.Parameter]:
    """Sharded over dp; beside tp, which nothing speaks of."""
    on = mesh((2, 2), ("dp", "tp"))
    torch.manual_seed(3)
    weights = [torch.randn(8, 4), torch.randn(8)]
    params = [
        nn.Parameter(distribute_tensor(w, on["dp"], [Shard(0)], src_data_rank=None))
        for w in weights
    ]
    for param in params:
        param.grad = param.detach().clone()
        perturb(param.data.to_local())
    return params


def fill_on_some(value: float) -> Callable[[Tensor], object]:
    return lambda weight: weight if dist.get_rank() % 2 else weight.fill_(value)


def no_false_alarm() -> None:
    rank = dist.get_rank()
    for perturb in (
        lambda weight: None,
        lambda weight: weight.mul_(1 + 1e-4 * rank),  # drifted by rounding
        fill_on_some(0.0),  # loaded or broadcast later
        fill_on_some(float("nan")),
    ):
        params = copies(perturb)
        assert distclip.Clipper(params).clip_().total_norm > 5
        assert distclip.clip_grad_norm_(params, 1.0) > 0.9
    meta = [nn.Parameter(torch.empty_like(p, device="meta")) for p in copies()]
    assert isinstance(meta[0], DTensor)
    distclip.Clipper(meta)


def test_no_false_alarm(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(no_false_alarm)


def declared_copies() -> None:
    """Who returns a Layout has spoken, also where it names no axis."""
    params = copies(lambda weight: weight.mul_(1 + dist.get_rank()))
    for call in CALLS.values():
        model = nn.ParameterList(params)
        with pytest.raises(distclip.LayoutError, match=r"axes \['tp'\]"):
            call(model)
        call(model, layouts=lambda name, param: distclip.Layout())


def test_declared_copies_are_not_compared(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(declared_copies)


def collectives_of(call: Callable[[], object]) -> int:
    with CommDebugMode() as comms:
        call()
    return comms.get_total_counts()


def compared_once() -> Sequence[int]:
    params = copies()
    grads = [param.grad for param in params]
    on_all_axes = [nn.Parameter(distribute_tensor(torch.ones(8), mesh((4,), ("dp",)), [Shard(0)]))]
    return (
        collectives_of(lambda: distclip.Clipper(params)),
        collectives_of(lambda: distclip.clip_grad_norm_(params, 1.0)),
        collectives_of(lambda: distclip.clip_grad_norm_(params, 1.0)),
        collectives_of(lambda: distclip.clip_grad_norm_(params, 1.0, 3.0)),  # another plan
        collectives_of(lambda: distclip.get_total_norm(grads)),  # layouts of their own
        collectives_of(lambda: distclip.get_total_norm(grads)),
        collectives_of(lambda: distclip.Clipper(on_all_axes)),
        collectives_of(lambda: distclip.Clipper(nn.Linear(2, 2))),
    )


def test_copies_are_compared_once_and_only_where_needed(four_on_cpus: Ranks) -> None:
    """An all-gather of objects is one of sizes and one of bytes; a step is one all-reduce."""
    for counts in four_on_cpus.run(compared_once):
        assert counts == (2, 3, 1, 1, 3, 1, 0, 0)


def another_model() -> None:
    """Laid out as a model that was right: a kept plan of that one must not hide its experts."""
    for _ in range(2):
        right = Mixed(expert_seed=10)
        distclip.clip_grad_norm_(right, 1.0)
        model = Mixed(expert_seed=10 + here())
        params = list(model.parameters())
        for given in (model, params, iter(params)):
            with pytest.raises(distclip.LayoutError, match="its values differ"):
                distclip.clip_grad_norm_(given, 1.0)


def test_each_model_is_compared(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(another_model)


def stages_of_different_kinds() -> None:
    """Of two stages only one has something to compare: the other has to take part all the same."""
    on = mesh((2, 2), ("pp", "tp"))
    stage = on["pp"].get_local_rank()
    torch.manual_seed(stage)
    weight = torch.randn(6)
    if stage == 0:
        weight = distribute_tensor(weight, on["tp"], [Shard(0)], src_data_rank=None)
    param = nn.Parameter(weight)
    param.grad = param.detach().clone()
    report = distclip.Clipper([param], distclip.ClipNorm(1e9), mesh=on).clip_()
    wholes = [torch.manual_seed(i) and torch.randn(6) for i in range(2)]
    expected = reference.total_norm(wholes).float()
    torch.testing.assert_close(report.total_norm, expected, rtol=1e-6, atol=0)
    param.data += on["tp"].get_local_rank()
    if stage == 0:
        param = nn.Parameter(param.detach().clone())
    with pytest.raises(distclip.LayoutError, match=r"axes \['tp'\]"):
        distclip.Clipper([param], mesh=on)


def test_stages_of_different_kinds(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(stages_of_different_kinds)
