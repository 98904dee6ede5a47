"""Parameters that a model or an optimizer gets, loses or replaces after the Clipper was made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm

import distclip
from distclip import AGC, AdaGC, AutoClip, ClipNorm, Clipper, ClipTensorNorm, LayoutError
from tests.support import reference
from tests.support.ranks import Ranks, mesh


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(100 + seed)
    (10 * model(torch.randn(4, 6)) - 3).square().mean().backward()


def gradients(params: Iterator[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in params if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads]


def new_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 5)


def longer(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3))


def deeper(model: nn.Sequential) -> None:
    model[0] = nn.Sequential(model[0], nn.Linear(6, 6))


def shorter(model: nn.Sequential) -> None:
    del model[0]
    model[0], model[1] = nn.Identity(), nn.Linear(6, 3)


def assigned(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def replaced(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(torch.randn(3))


def tied(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 6))
    model.append(nn.Linear(6, 3))
    model[4].weight = model[2].weight


def lost_a_bias(model: nn.Sequential) -> None:
    model[2].register_parameter("bias", None)


def old_weight_norm(model: nn.Sequential) -> None:
    weight_norm(model[2])


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "a new head": new_head,
    "a longer model": longer,
    "a module in a module": deeper,
    "a shorter model": shorter,
    "load_state_dict(assign=True)": assigned,
    "a new parameter": replaced,
    "a tied parameter": tied,
    "a parameter less": lost_a_bias,
    "weight_norm": lambda model: parametrizations.weight_norm(model[2]),
    "spectral_norm": lambda model: parametrizations.spectral_norm(model[2]),
    "orthogonal": lambda model: parametrizations.orthogonal(model[0]),
    "the old weight_norm": old_weight_norm,
    "pruning": lambda model: prune.l1_unstructured(model[0], "weight", amount=2),
    "another dtype": lambda model: model.double().float(),
    "frozen": lambda model: model[0].requires_grad_(False),
    "nothing": lambda model: None,
}
POLICIES = {
    "norm": ClipNorm(0.5),
    "tensor": ClipTensorNorm(0.1),
    "units": AGC(0.01),
    "adaptive": AutoClip() & ClipNorm(0.5),
}


def as_new(model: nn.Module, policy: Any) -> list[Tensor]:
    """The gradients after a Clipper that was made just now."""
    others = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    for other, param in zip(others, model.parameters(), strict=True):
        other.grad = None if param.grad is None else param.grad.clone()
    Clipper(others, policy).clip_()
    return gradients(iter(others))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_is_followed(change: str, policy: str, overlap: bool) -> None:
    model = make_model()
    clipper = Clipper(model, POLICIES[policy], overlap=overlap)
    for step in range(2):
        backward(model, step)
        clipper.clip_()
        model.zero_grad()
    CHANGES[change](model)
    for step in range(2):
        backward(model, step)
        before = gradients(model.parameters())
        expected = None if policy == "adaptive" else as_new(model, POLICIES[policy])
        report = clipper.clip_()
        torch.testing.assert_close(
            report.total_norm.double(), reference.total_norm(before), rtol=1e-6, atol=0
        )
        if expected is not None:
            torch.testing.assert_close(gradients(model.parameters()), expected)
        else:
            assert reference.total_norm(gradients(model.parameters())) <= 0.5 + 1e-6
        model.zero_grad()


def test_groups_of_modules_are_followed() -> None:
    model = make_model()
    groups = [
        {"name": "body", "params": model[0], "policy": ClipNorm(0.1)},
        {"name": "head", "params": model[2], "policy": ClipNorm(0.2)},
        {"name": "alone", "params": [extra := nn.Parameter(torch.zeros(2))]},
    ]
    clipper = Clipper(groups)
    parametrizations.weight_norm(model[2])
    backward(model)
    extra.grad = torch.tensor([30.0, 40.0])
    report = clipper.clip_()
    assert report.norms["alone"].item() == 50.0
    for name, module, limit in (("body", model[0], 0.1), ("head", model[2], 0.2)):
        norm = reference.total_norm(gradients(module.parameters()))
        torch.testing.assert_close(norm.item(), limit, rtol=1e-6, atol=0)
        assert report.norms[name] > limit


def test_statistics_of_what_stayed_are_kept() -> None:
    model = make_model()
    clipper = Clipper(model, AdaGC(warmup_steps=1))
    backward(model)
    clipper.clip_()
    before = clipper.state_dict()["groups"]["all"]["AdaGC"]
    model[2] = nn.Linear(6, 5)
    model.append(nn.Linear(5, 2))
    model.zero_grad()
    clipper.clip_()  # nothing has a gradient: the averages stay
    after = clipper.state_dict()["groups"]["all"]["AdaGC"]
    assert after["num_steps"] == 2
    assert set(after["gamma"]) == {f"{i}.{n}" for i in (0, 2, 3) for n in ("weight", "bias")}
    for name in ("0.weight", "0.bias", "2.weight"):
        assert after["gamma"][name] == before["gamma"][name] < torch.inf
    assert after["gamma"]["3.weight"] == torch.inf


def test_a_model_that_does_not_change_keeps_its_plan() -> None:
    model = make_model()
    clipper = Clipper(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = clipper.plan
    for step in range(3):
        backward(model, step)
        clipper.step(optimizer)
        optimizer.zero_grad()
    assert clipper.plan is plan


HOWS = ("clip_", "step", "attach", "decide")


def take_step(
    how: str, clipper: Clipper, optimizer: Any, scaler: GradScaler | None, attached: list[Any]
) -> float:
    """One step of the optimizer; the norm that was reported."""
    if how == "attach":
        if not attached:
            attached.append(clipper.attach(optimizer, scaler))
        scaler.step(optimizer) if scaler else optimizer.step()
        return attached[0].report.total_norm.item()
    if how == "step":
        return clipper.step(optimizer, scaler).total_norm.item()
    if how == "decide":
        decision = clipper.decide(optimizer, scaler)
        decision.apply_()
        report = decision.report
    else:
        report = clipper.clip_(optimizer, scaler)
    scaler.step(optimizer) if scaler else optimizer.step()
    return report.total_norm.item()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["list", "module"])
@pytest.mark.parametrize("how", HOWS)
def test_parameters_that_an_optimizer_gets(how: str, kind: str, fused: bool, scaled: bool) -> None:
    """Unfrozen layers, given to the optimizer by add_param_group, and a head outside of the model.

    Under a scaler their gradients are unscaled too.
    """
    body, tail = make_model(), nn.Linear(3, 3)
    body[0].requires_grad_(False)
    model = nn.Sequential(body, nn.Tanh(), tail)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, fused=fused)
    scaler = GradScaler("cpu", init_scale=1024.0) if scaled else None
    clipper = Clipper(model if kind == "module" else trained, ClipNorm(0.5))
    attached: list[Any] = []
    for step in range(4):
        if step == 1:
            body[0].requires_grad_(True)
            optimizer.add_param_group({"params": body[0].parameters()})
        if step == 2:
            outside = nn.Linear(3, 3)
            model = nn.Sequential(model, outside)
            optimizer.add_param_group({"params": outside.parameters()})
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = (10 * model(torch.randn(4, 6)) - 3).square().mean()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        true = reference.total_norm(list(torch.autograd.grad(loss, params, retain_graph=True)))
        (scaler.scale(loss) if scaler else loss).backward()
        before = [p.detach().clone() for p in params]
        reported = take_step(how, clipper, optimizer, scaler, attached)
        if scaler:
            scaler.update()
        moved = reference.total_norm([p.detach() - b for p, b in zip(params, before, strict=True)])
        torch.testing.assert_close(reported, true.item(), rtol=1e-5, atol=0)
        torch.testing.assert_close(moved.item(), 0.1 * min(0.5, true.item()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_parameters_that_come_after_attach(closure: bool, steps_before: int) -> None:
    """Also before the first step, and where the optimizer evaluates a closure."""
    first, late = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    module = nn.ParameterDict({"first": first, "late": late})
    optimizer = torch.optim.SGD([first], lr=1.0)
    clipper = Clipper([first], AdaGC(warmup_steps=9, max_norm=1.0), modules=module)
    attached = clipper.attach(optimizer)

    def backward() -> None:
        for param in (first, late):
            param.grad = torch.full((2,), 8.0)

    for step in range(3):
        if step == steps_before:
            optimizer.add_param_group({"params": [late]})
        before = late.detach().clone()
        backward()
        optimizer.step(backward) if closure else optimizer.step()
        norm = 8 * (2.0 if step >= steps_before else 2.0**0.5)
        torch.testing.assert_close(attached.report.total_norm.item(), norm, rtol=1e-6, atol=0)
        moved = (before - late.detach()).norm().item()
        assert moved == pytest.approx(0.5**0.5 if step >= steps_before else 0, rel=1e-6)
    gamma = clipper.state_dict()["groups"]["all"]["AdaGC"]["gamma"]
    assert set(gamma) == {"first", "late"}  # the names in the module


def test_parameters_unfrozen_in_the_optimizer() -> None:
    """They were in the optimizer from the start, and the list had those that trained."""
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper([p for p in model.parameters() if p.requires_grad], ClipNorm(0.5))
    for step in range(2):
        model[0].requires_grad_(step == 1)
        optimizer.zero_grad()
        backward(model)
        true = reference.total_norm(gradients(model.parameters()))
        report = clipper.clip_(optimizer)
        torch.testing.assert_close(report.total_norm.double(), true, rtol=1e-6, atol=0)


def test_a_part_of_what_an_optimizer_steps_stays_a_part() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper(model[2], ClipNorm(0.5))
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        before = model[0].weight.grad.clone()
        clipper.clip_(optimizer)
        assert torch.equal(model[0].weight.grad, before)
    with pytest.raises(ValueError, match="2 parameters of the optimizer are not the Clipper's"):
        clipper.clip_(optimizer, scale=0.5)
    assert torch.equal(model[0].weight.grad, before)


def test_several_groups_do_not_know_where_a_new_parameter_belongs() -> None:
    model = make_model()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    clipper, optimizer = Clipper(groups), torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    clipper.clip_(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
    before = gradients(model.parameters())
    with pytest.raises(ValueError, match=r"shape \[7\].*\['group0', 'group1'\].*new Clipper"):
        clipper.clip_(optimizer)
    torch.testing.assert_close(gradients(model.parameters()), before, rtol=0, atol=0)


def test_an_optimizer_of_what_took_the_places_of_a_list() -> None:
    model = make_model()
    clipper = Clipper(list(model.parameters()))
    assigned(model)
    backward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass the module instead of a list"):
        clipper.clip_(optimizer)


def test_a_lazy_module_that_gets_its_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3))
    clippers = [Clipper(model, ClipNorm(1e9)), Clipper(list(model.parameters()), ClipNorm(1e9))]
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        true = reference.total_norm(gradients(model.parameters()))
        for clipper in clippers:
            torch.testing.assert_close(clipper.clip_().total_norm.double(), true)


# --- on several ranks ------------------------------------------------------------------------


def wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        fully_shard(model[0])
        return fully_shard(model)
    if kind == "tp":
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        return parallelize_module(
            model, mesh((4,), ("tp",)), {"2": ColwiseParallel(output_layouts=Replicate())}
        )
    cpu = torch.device("cpu")
    original = kind != "fsdp1 flat"
    if kind == "fsdp1 inside":
        model[0] = FullyShardedDataParallel(model[0], use_orig_params=True, device_id=cpu)
        return model
    return FullyShardedDataParallel(model, use_orig_params=original, device_id=cpu)


def wrapped_after(kind: str, source: str) -> str:
    """The true norm, or an error on all ranks."""
    torch.manual_seed(0)
    model = make_model()
    if kind == "tp":
        model[2] = nn.Linear(6, 4)
    plain = copy.deepcopy(model)
    clipper = Clipper(model if source == "module" else list(model.parameters()), ClipNorm(0.5))
    wrapped = wrap(kind, model)
    backward(wrapped)  # the same on every rank: the mean is each one's
    backward(plain)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    true = reference.total_norm(gradients(plain.parameters()))
    try:
        report = clipper.clip_(optimizer)
    except ValueError as error:
        return str(error)
    torch.testing.assert_close(report.total_norm.double(), true, rtol=1e-5, atol=0)
    return "right"


@pytest.mark.parametrize("source", ["module", "list"])
@pytest.mark.parametrize(
    "kind", ["ddp", "fsdp2", "tp", "fsdp1 flat", "fsdp1 original", "fsdp1 inside"]
)
def test_a_model_wrapped_after_the_clipper(four_on_cpus: Ranks, kind: str, source: str) -> None:
    found = set(four_on_cpus.run(wrapped_after, kind, source))
    assert len(found) == 1
    (said,) = found
    is_right = kind == "ddp" or (source == "module" and kind in ("fsdp2", "tp", "fsdp1 inside"))
    assert (said == "right") == is_right, said
    if not is_right:
        assert "wrapped" in said


def used_before(when: str, kind: str, policy: Any) -> None:
    """A forward without backward leaves the root unsharded: `parameters()` shows others."""
    torch.manual_seed(0)
    model = make_model()
    plain = copy.deepcopy(model)
    if kind != "all in root":
        fully_shard(model[0], reshard_after_forward=kind != "kept")
    fully_shard(model, reshard_after_forward=False if kind == "kept" else None)
    if when == "before the Clipper":
        with torch.no_grad():
            model(torch.ones(2, 6))
    clipper = Clipper(model, policy)
    listed = Clipper(list(model.parameters()), policy)
    backward(model)
    backward(plain)
    if when == "before the clip":
        with torch.no_grad():
            model(torch.ones(2, 6))
    true = reference.total_norm(gradients(plain.parameters()))
    calls: dict[str, Callable[[], Tensor]] = {
        "module": lambda: clipper.clip_().total_norm,
        "list": lambda: listed.clip_().total_norm,
        "function, module": lambda: distclip.clip_grad_norm_(model, 1e9),
        "function, list": lambda: distclip.clip_grad_norm_(model.parameters(), 1e9),
        "get_total_norm": lambda: distclip.get_total_norm(model),
    }
    for name, call in calls.items():
        if when == "before the clip":
            with torch.no_grad():
                model(torch.ones(2, 6))
        torch.testing.assert_close(
            call().double(), true, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    distclip.clip_grad_value_(model.parameters(), 0.0)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    assert all(not grad.any() for grad in gradients(model.parameters()))


@pytest.mark.parametrize("policy", [ClipNorm(1e9), ClipTensorNorm(1e9)], ids=["norm", "tensor"])
@pytest.mark.parametrize("kind", ["root and a layer", "all in root", "kept"])
@pytest.mark.parametrize("when", ["before the Clipper", "before the clip"])
def test_fsdp2_models_that_were_used_without_backward(
    four_on_cpus: Ranks, when: str, kind: str, policy: Any
) -> None:
    four_on_cpus.run(used_before, when, kind, policy)


def changes_on_one_rank() -> str:
    """An error that one rank alone can see is raised on all."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = fully_shard(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper(model)
    backward(model)
    clipper.clip_(optimizer, scale=1.0)
    if dist.get_rank() == 1:
        other = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)
        optimizer = other
    before = gradients(model.parameters())
    with pytest.raises(ValueError, match="1 parameters of the optimizer are not") as caught:
        clipper.clip_(optimizer, scale=0.5)
    torch.testing.assert_close(gradients(model.parameters()), before, rtol=0, atol=0)
    assert not isinstance(caught.value, LayoutError)
    return str(caught.value)


def test_an_error_of_one_rank_is_that_of_all(four_on_cpus: Ranks) -> None:
    assert len(set(four_on_cpus.run(changes_on_one_rank))) == 1
