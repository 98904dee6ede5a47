"""Clipping in hooks of backward that step: the weights of the ordinary loop, or one clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import distclip
from tests.support import reference
from tests.support.ranks import Ranks, device_of, mesh
from tests.support.wrapped import local, loss_of, make_model

LR = 0.1
PER_TENSOR = {
    "tensor": distclip.ClipTensorNorm(0.05),
    "agc": distclip.AGC(0.01),
    "value": distclip.ClipValue(0.005),
    "rms": distclip.ClipBlockRMS(0.002),
    "minimum": distclip.ClipTensorNorm(0.05) & distclip.ClipBlockRMS(0.002),
    "excludes": distclip.AGC(0.01, exclude=("head", "*.norm.*")),
}
PER_TENSOR["adagn"] = distclip.AdaGN()
ADAGC = distclip.AdaGC(max_norm=0.05, warmup_steps=1)
OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=LR, momentum=0.9),
    "adamw": lambda params: AdamW(params, lr=0.01),
}


def double_model() -> nn.Module:
    return make_model("cpu").double()


def with_hooks(
    model: nn.Module, make: Callable[[Sequence[Tensor]], Optimizer] = OPTIMIZERS["sgd"]
) -> list[Optimizer]:
    """As torchtune does: an optimizer for each parameter, which a hook steps."""
    optimizers = {param: make([param]) for param in model.parameters()}

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    return list(optimizers.values())


def apply_in_backward(kind: type[Optimizer], model: nn.Module, **options: Any) -> list[Optimizer]:
    """torch's own, whose module torch itself imports with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import (  # pyright: ignore[reportPrivateUsage]
            _apply_optimizer_in_backward,
            _get_in_backward_optimizers,
        )

    _apply_optimizer_in_backward(kind, model.parameters(), options)
    return _get_in_backward_optimizers(model)


def batches(count: int = 4) -> list[Tensor]:
    """Of 8 sequences each."""
    tokens = torch.randint(11, (8 * count, 4), generator=torch.Generator().manual_seed(3))
    return list(tokens.chunk(count))


def backward(model: nn.Module, batch: Tensor, factor: float = 1.0) -> None:
    batch = batch.to(next(model.parameters()).device)
    (factor * loss_of(model, batch)).backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [
        (p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()).to("cpu", copy=True)
        for p in model.parameters()
    ]


def ordinary(policy: Any, make: Any, steps: Sequence[Tensor]) -> tuple[nn.Module, list[Any]]:
    model = double_model()
    optimizer = make(list(model.parameters()))
    clipper = distclip.Clipper(model, policy)
    reports = []
    for batch in steps:
        backward(model, batch)
        reports.append(clipper.clip_())
        optimizer.step()
        optimizer.zero_grad()
    return model, reports


def same(mine: Sequence[Tensor], theirs: Sequence[Tensor], rtol: float = 1e-9) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol)


# Limits per tensor


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("policy", PER_TENSOR.values(), ids=PER_TENSOR)
def test_limits_per_tensor_give_the_weights_of_the_ordinary_loop(policy: Any, make: Any) -> None:
    expected, reports = ordinary(policy, make, batches())
    assert all(report.coefficient != 1 for report in reports)
    model = double_model()
    attached = distclip.Clipper(model, policy).attach_in_backward(with_hooks(model, make))
    for batch, report in zip(batches(), reports, strict=True):
        backward(model, batch)
        assert all(p.grad is None for p in model.parameters())
        mine = attached.end_step()
        torch.testing.assert_close(mine.total_norm, report.total_norm)
    same(weights(model), weights(expected))


def test_one_step_against_the_reference() -> None:
    whole, model = double_model(), double_model()
    before = weights(model)
    backward(whole, batches()[0])
    grads = [p.grad for p in whole.parameters() if p.grad is not None]
    clipped = reference.clip_tensor_norm(grads, 0.05)
    assert any(not torch.equal(a, b) for a, b in zip(grads, clipped, strict=True))
    hooks = with_hooks(model, lambda params: SGD(params, lr=LR))
    attached = distclip.Clipper(model, PER_TENSOR["tensor"]).attach_in_backward(hooks)
    backward(model, batches()[0])
    report = attached.end_step()
    same(weights(model), [w - LR * g for w, g in zip(before, clipped, strict=True)])
    torch.testing.assert_close(report.total_norm, reference.total_norm(grads))


def test_optimizers_of_torch_that_step_in_backward() -> None:
    expected, _ = ordinary(PER_TENSOR["tensor"], OPTIMIZERS["adamw"], batches())
    model = double_model()
    optimizers = apply_in_backward(AdamW, model, lr=0.01)
    attached = distclip.Clipper(model, PER_TENSOR["tensor"]).attach_in_backward(optimizers)
    for batch in batches():
        backward(model, batch)
        attached.end_step()
    same(weights(model), weights(expected))


def test_an_optimizer_for_each_block() -> None:
    """One that steps several tensors at once, of which some are in another group."""
    model, expected = double_model(), double_model()
    make = OPTIMIZERS["sgd"]

    def groups(of: nn.Module) -> list[dict[str, Any]]:
        named = dict(of.named_parameters())
        flat = [p for n, p in named.items() if p.ndim < 2]
        return [
            {"params": [p for p in named.values() if p.ndim > 1], "policy": PER_TENSOR["agc"]},
            {"params": flat, "policy": PER_TENSOR["value"], "name": "flat"},
        ]

    optimizer, clipper = make(list(expected.parameters())), distclip.Clipper(groups(expected))
    mine = [make(list(child.parameters())) for child in model.children()]
    attached = distclip.Clipper(groups(model)).attach_in_backward(mine)
    for batch in batches():
        backward(expected, batch)
        assert clipper.clip_().clipped
        optimizer.step()
        optimizer.zero_grad()
        backward(model, batch)
        for each in reversed(mine):
            each.step()
            each.zero_grad()
        attached.end_step()
    same(weights(model), weights(expected))


def test_adagc_is_that_of_the_ordinary_loop_after_its_warm_up() -> None:
    """In the warm-up it limits by the norm of the model: here a first step without a limit."""
    policy = distclip.AdaGC(max_norm=1e9, warmup_steps=1)
    steps = [batches()[0], *batches()]
    expected, reports = ordinary(policy, OPTIMIZERS["sgd"], steps)
    assert reports[2].clipped or reports[3].clipped or reports[4].clipped
    model = double_model()
    clipper = distclip.Clipper(model, policy)
    attached = clipper.attach_in_backward(with_hooks(model))
    for batch in steps:
        backward(model, batch)
        attached.end_step()
    same(weights(model), weights(expected))
    assert clipper.state_dict()["groups"]["all"]["AdaGC"]["num_steps"] == len(steps)


def test_adagc_limits_a_tensor_by_its_own_norm_at_least_in_the_first_step() -> None:
    model = double_model()
    before = weights(model)
    hooks = with_hooks(model, lambda params: SGD(params, lr=1.0))
    attached = distclip.Clipper(model, ADAGC).attach_in_backward(hooks)
    backward(model, batches()[0], 100.0)
    attached.end_step()
    steps = [(a - b).norm() for a, b in zip(weights(model), before, strict=True)]
    assert max(steps) == pytest.approx(0.05)


def test_adagc_limits_by_the_norm_of_the_step_before_while_it_warms_up() -> None:
    weights_of = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    model = nn.ParameterList(weights_of)
    hooks = with_hooks(model, lambda params: SGD(params, lr=1.0))
    policy = distclip.AdaGC(max_norm=1.0, warmup_steps=5)
    attached = distclip.Clipper(model, policy).attach_in_backward(hooks)
    for expected in (1.0, 30 / 50):  # by their own norms, then by that of both
        before = weights(model)
        (30 * model[0][0] + 40 * model[1][0]).backward()
        assert attached.end_step().total_norm == pytest.approx(50)
        assert (weights(model)[0] - before[0]).norm() == pytest.approx(expected)


# Limits for the whole model


@pytest.mark.parametrize(
    "policy",
    [distclip.ClipNorm(0.1), distclip.ZClip(max_norm=0.2), distclip.AutoClip(50.0)],
    ids=["norm", "zclip", "autoclip"],
)
def test_limits_of_the_model_come_one_step_late(policy: Any) -> None:
    """Against a loop that multiplies by the coefficient of the step before, in float64."""
    expected, model = double_model(), double_model()
    clipper, coefficient = distclip.Clipper(expected, policy), 1.0
    attached = distclip.Clipper(model, policy).attach_in_backward(
        with_hooks(model, lambda params: SGD(params, lr=LR))
    )
    used = []
    for batch in batches():
        backward(expected, batch)
        report = clipper.decide().report
        for param in expected.parameters():
            param.data -= LR * coefficient * param.grad
            param.grad = None
        backward(model, batch)
        mine = attached.end_step()
        assert mine.coefficient.item() == pytest.approx(coefficient)
        torch.testing.assert_close(mine.total_norm, report.total_norm)
        used.append(coefficient)
        coefficient = report.coefficient.item()
    assert used[0] == 1
    assert min(used) < 1
    same(weights(model), weights(expected))


def test_the_bound_of_a_late_limit() -> None:
    """A norm n after one of m is clipped to limit * n / m: the limit times their ratio."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    hooks = with_hooks(nn.ParameterList([weight]), lambda params: SGD(params, lr=1.0))
    attached = distclip.Clipper([weight], distclip.ClipNorm(1.0)).attach_in_backward(hooks)
    lengths = []
    for norm in (10.0, 20.0, 0.5, 4.0):
        before = weight.detach().clone()
        (norm * weight[0]).backward()
        assert attached.end_step().total_norm == norm
        lengths.append((weight.detach() - before).norm().item())
    assert lengths == pytest.approx([10.0, 20 / 10, 0.5 / 20, 4.0])


def test_the_state_of_a_late_limit() -> None:
    def run(saved: Any, norms: Sequence[float]) -> tuple[list[float], Any]:
        weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        hooks = with_hooks(nn.ParameterList([weight]), lambda params: SGD(params, lr=1.0))
        attached = distclip.Clipper([weight], distclip.ClipNorm(1.0)).attach_in_backward(hooks)
        if saved is not None:
            attached.load_state_dict(saved)
        coefficients = []
        for norm in norms:
            (norm * weight[0]).backward()
            coefficients.append(attached.end_step().coefficient.item())
        return coefficients, attached.state_dict()

    whole, _ = run(None, [10.0, 20.0, 5.0])
    first, saved = run(None, [10.0, 20.0])
    assert first + run(saved, [5.0])[0] == whole == pytest.approx([1.0, 0.1, 0.05])
    assert run(run(None, [])[1], [5.0])[0] == [1.0]
    for wrong in ({}, {**saved, "norms": {"x": 1.0}}, {**saved, "coefficients": {"all": 2.0}}):
        with pytest.raises(ValueError, match="Nothing was loaded"):
            run(wrong, [])
    with pytest.raises(TypeError, match="Nothing was loaded"):
        run([1], [])


def test_a_second_end_step_changes_nothing_for_the_next() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    hooks = with_hooks(nn.ParameterList([weight]))
    attached = distclip.Clipper([weight], distclip.ClipNorm(1.0)).attach_in_backward(hooks)
    (10 * weight[0]).backward()
    attached.end_step()
    assert attached.end_step().total_norm == 0
    (10 * weight[0]).backward()
    assert attached.end_step().coefficient == pytest.approx(0.1)


# NaN and infinity


@pytest.mark.parametrize("policy", [PER_TENSOR["tensor"], distclip.ClipNorm(0.1)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zero_steps_only_the_others(policy: Any, bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    before = weights(model)
    hooks = with_hooks(model, lambda params: SGD(params, lr=LR))
    clipper = distclip.Clipper(model, policy, on_nonfinite="zero", max_consecutive_skips=1)
    attached = clipper.attach_in_backward(hooks)
    model[0].bias.register_hook(lambda grad: grad * bad)
    model(torch.ones(3, 2)).sum().backward()
    assert not attached.end_step().finite
    assert [torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)] == [
        *(False, True),
        *(False, False),
    ]
    assert clipper.skipped == 1
    assert attached.report is not None
    assert attached.report.nonfinite_parameters() == {"0.bias": [0]}
    model(torch.ones(3, 2)).sum().backward()
    with pytest.raises(distclip.NonFiniteGradientError, match=r"'0.bias'.*stepped zeros"):
        attached.end_step()


def test_raise_raises_at_the_end_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    clipper = distclip.Clipper(model, distclip.ClipNorm(0.1), on_nonfinite="raise")
    attached = clipper.attach_in_backward(with_hooks(model))
    handle = model[0].bias.register_hook(lambda grad: grad * float("nan"))
    model(torch.ones(3, 2)).sum().backward()
    with pytest.raises(distclip.NonFiniteGradientError, match=r"'0.bias'.*nan"):
        attached.end_step()
    assert all(w.isfinite().all() for w in weights(model))
    handle.remove()
    model(torch.ones(3, 2)).sum().backward()
    assert attached.end_step().coefficient == 1  # no norm was finite before
    model(torch.ones(3, 2)).sum().backward()
    assert attached.end_step().coefficient < 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_propagate_lets_it_into_the_weights_but_not_into_the_coefficient(bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    attached = distclip.Clipper(model, distclip.ClipNorm(0.1)).attach_in_backward(with_hooks(model))
    model(torch.ones(3, 2)).sum().backward()
    attached.end_step()
    handle = model[1].bias.register_hook(lambda grad: grad * bad)
    model(torch.ones(3, 2)).sum().backward()
    attached.end_step()
    handle.remove()
    assert not model[1].bias.isfinite().any()
    assert model[0].weight.isfinite().all()
    assert 0 < attached.state_dict()["coefficients"]["all"] < 1


# What else happens in a loop


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]).double()
    attached = distclip.Clipper(model, distclip.ClipTensorNorm(0.1)).attach_in_backward(
        with_hooks(model)
    )
    for used in (0, 1):
        model[used](torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        assert attached.end_step().total_norm == pytest.approx(2**0.5)


def test_tied_weights_are_clipped_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    model[1].weight = model[0].weight
    before = weights(model)
    hooks = with_hooks(model, lambda params: SGD(params, lr=1.0))
    attached = distclip.Clipper(model, distclip.ClipTensorNorm(0.1)).attach_in_backward(hooks)
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    attached.end_step()
    assert (weights(model)[0] - before[0]).norm() == pytest.approx(0.1)


def test_hooks_that_step_with_the_last_micro_batch_alone() -> None:
    expected, _ = ordinary(PER_TENSOR["tensor"], OPTIMIZERS["sgd"], [torch.cat(batches())])
    model = double_model()
    optimizers, steps = {p: OPTIMIZERS["sgd"]([p]) for p in model.parameters()}, [False]

    def hook(param: Tensor) -> None:
        if steps[0]:
            optimizers[param].step()
            param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    attached = distclip.Clipper(model, PER_TENSOR["tensor"]).attach_in_backward(optimizers.values())
    for i, batch in enumerate(batches()):
        steps[0] = i == 3
        backward(model, batch, 1 / 4)
    attached.end_step()
    same(weights(model), weights(expected))


def test_a_step_that_calls_the_hooks_twice_clips_once() -> None:
    class Nested(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    hooks = with_hooks(nn.ParameterList([weight]), lambda params: Nested(params, lr=1.0))
    attached = distclip.Clipper([weight], distclip.ClipTensorNorm(1.0)).attach_in_backward(hooks)
    (10 * weight[0]).backward()
    attached.end_step()
    assert weight.detach().norm() == 1


def test_remove_ends_it() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizers = with_hooks(nn.ParameterList([weight]), lambda params: SGD(params, lr=1.0))
    clipper = distclip.Clipper([weight], distclip.ClipTensorNorm(1.0))
    attached = clipper.attach_in_backward(optimizers)
    attached.remove()
    (10 * weight[0]).backward()
    assert weight.detach().norm() == 10
    clipper.attach(optimizers).remove()
    clipper.attach_in_backward(optimizers)


def test_tensor_norms() -> None:
    model, whole = double_model(), double_model()
    clipper = distclip.Clipper(model, distclip.ClipNorm(0.1), tensor_norms=True)
    attached = clipper.attach_in_backward(with_hooks(model))
    backward(model, batches()[0])
    backward(whole, batches()[0])
    assert attached.end_step().tensor_norms() == pytest.approx(
        {name: p.grad.norm().item() for name, p in whole.named_parameters()}  # pyright: ignore
    )


# One clear error


def attach(model: nn.Module, optimizers: Any = None, policy: Any = None, **options: Any) -> Any:
    clipper = distclip.Clipper(model, policy or distclip.ClipNorm(1.0), **options)
    return clipper.attach_in_backward(with_hooks(model) if optimizers is None else optimizers)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"on_nonfinite": "skip"}, "skip.*cannot be left out"),
        ({"policy": distclip.SkipSpike() & distclip.ClipNorm(1.0)}, "it leaves out whole steps"),
        ({"overlap": True}, "overlap=True"),
        ({"gradient": lambda param: param.grad}, "gradient="),
        ({"tensor_norms": True, "policy": distclip.AGC(0.1)}, "tensor_norms="),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        attach(double_model(), **options)


def test_optimizers_that_cannot_be() -> None:
    model = double_model()
    first, *rest = with_hooks(model)
    with pytest.raises(ValueError, match=r"no optimizer given steps 'embed.weight'"):
        attach(model, rest)
    with pytest.raises(ValueError, match=r"'embed.weight' with two optimizers"):
        attach(model, [first, *rest, SGD([model.embed.weight], lr=1.0)])  # pyright: ignore
    with pytest.raises(ValueError, match="does not hold"):
        attach(model, [first, *rest, SGD([nn.Parameter(torch.zeros(2))], lr=1.0)])
    with pytest.raises(TypeError, match="no optimizer"):
        attach(model, [1])
    with pytest.raises(TypeError, match="attach"):
        attach(model, [])


def test_a_frozen_parameter_needs_no_optimizer_until_it_trains() -> None:
    model = double_model()
    model.embed.weight.requires_grad_(False)  # pyright: ignore
    params = [p for p in model.parameters() if p.requires_grad]
    attached = attach(model, with_hooks(nn.ParameterList(params)))
    backward(model, batches()[0])
    attached.end_step()
    model.embed.weight.requires_grad_(True)  # pyright: ignore
    backward(model, batches()[0])
    with pytest.raises(ValueError, match=r"other parameters|'embed.weight' trains now"):
        attached.end_step()


def test_a_model_that_gets_another_parameter() -> None:
    model = double_model()
    attached = attach(model)
    model.head = nn.Linear(6, 3, dtype=torch.float64)
    backward(model, batches()[0])
    with pytest.raises(ValueError, match="other parameters"):
        attached.end_step()


def test_calls_in_the_place_of_end_step() -> None:
    model = double_model()
    clipper = distclip.Clipper(model)
    optimizers = with_hooks(model)
    attached = clipper.attach_in_backward(optimizers)
    backward(model, batches()[0])
    for call in (
        clipper.clip_,
        clipper.decide,
        lambda: clipper.step(optimizers),
        lambda: clipper.attach(optimizers),
        lambda: clipper.attach_in_backward(optimizers),
    ):
        with pytest.raises(ValueError, match=r"attached\.end_step"):
            call()
    attached.end_step()
    attached.remove()
    clipper.attach(optimizers)
    with pytest.raises(ValueError, match=r"attached to `optimizer.step"):
        clipper.attach_in_backward(optimizers)


def test_a_step_that_was_not_ended() -> None:
    model = double_model()
    attached = attach(model)
    backward(model, batches()[0])
    with pytest.raises(ValueError, match=r"'head.bias' steps again before"):
        backward(model, batches()[0])
    attached.end_step()
    for param in model.parameters():
        param.grad = None
    backward(model, batches()[0])
    attached.end_step()


def test_a_backward_that_raised() -> None:
    model = double_model()
    attached = attach(model)

    def fail(_: Tensor) -> None:
        raise RuntimeError("mine")

    handle = model.embed.weight.register_hook(fail)  # pyright: ignore
    with pytest.raises(RuntimeError, match="mine"):
        backward(model, batches()[0])
    handle.remove()
    with pytest.raises(ValueError, match="after a backward that raised"):
        backward(model, batches()[0])
    for param in model.parameters():
        param.grad = None
    attached.end_step()
    backward(model, batches()[0])
    assert attached.end_step().finite


def test_a_gradient_that_nobody_stepped() -> None:
    model = double_model()
    attached = attach(model, [SGD([p], lr=LR) for p in model.parameters()])
    backward(model, batches()[0])
    with pytest.raises(ValueError, match=r"'embed\.weight' has a gradient.*has not stepped"):
        attached.end_step()


@pytest.mark.parametrize("policy", [distclip.ClipNorm(1.0), distclip.ClipTensorNorm(1.0)])
def test_what_a_hook_cannot_clip_is_not_stepped_and_raised_at_the_end(policy: Any) -> None:
    weight, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
    model = nn.ParameterList([weight, other])
    optimizers = [SGD([p], lr=1.0) for p in model]
    attached = attach(model, optimizers, policy)
    weight.grad = torch.ones(1).expand(3)
    other.grad = torch.ones(1)
    for each in optimizers:
        each.step()
        each.zero_grad()
    assert weight.tolist() == [0, 0, 0]
    assert other.item() == -1
    with pytest.raises(ValueError, match=r"'0'.*single memory"):
        attached.end_step()


def test_a_policy_that_returns_a_negative_limit() -> None:
    class Wrong(distclip.PolicyBase):
        scope, norm_type = distclip.Scope.TENSOR, 2.0

        def init(self, num_groups: int, device: torch.device) -> tuple[()]:
            return ()

        def limit(self, norms: Tensor, state: Any, context: Any) -> Any:
            return -torch.ones_like(norms), state

    model = double_model()
    before = weights(model)
    attached = attach(model, policy=Wrong())
    backward(model, batches()[0])
    with pytest.raises(ValueError, match="negative"):
        attached.end_step()
    same(weights(model), before)


def test_a_closure_and_a_scaler() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=1.0)
    attach(nn.ParameterList([weight]), [optimizer])
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"step\(closure\)"):
        optimizer.step(lambda: 0.0)
    fused = SGD([weight], lr=1.0, fused=True)
    attach(nn.ParameterList([weight]), [fused])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(ValueError, match="GradScaler"):
        scaler.step(fused)


@pytest.mark.parametrize("with_torch", [True, False])
def test_clipping_after_backward_what_has_stepped_there(with_torch: bool) -> None:
    model = double_model()
    _ = apply_in_backward(SGD, model, lr=LR) if with_torch else with_hooks(model)
    clipper = distclip.Clipper(model)
    backward(model, batches()[0])
    with pytest.raises(ValueError, match=r"attach_in_backward"):
        clipper.clip_()
    with pytest.raises(ValueError, match=r"attach_in_backward"):
        distclip.clip_grad_norm_(model.parameters(), 1.0)


def test_the_only_tensor_that_trains_has_stepped_in_backward() -> None:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    optimizer = SGD([model.weight], lr=LR)

    def hook(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    model.weight.register_post_accumulate_grad_hook(hook)
    clipper = distclip.Clipper(model)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"cannot clip 'weight'.*attach_in_backward"):
        clipper.clip_()


def test_hooks_that_do_not_step_are_no_error() -> None:
    model = double_model()
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: None)
    backward(model, batches()[0])
    model.embed.weight.grad = None  # pyright: ignore
    distclip.Clipper(model).clip_()
    overlapping = double_model()
    distclip.Clipper(overlapping, overlap=True).clip_()


def test_attach_in_the_place_of_attach_in_backward() -> None:
    model = double_model()
    distclip.Clipper(model).attach(with_hooks(model))
    with pytest.raises(ValueError, match=r"attach_in_backward"):
        backward(model, batches()[0])


# Ranks


def _ranks_batch(index: int, rank: int, size: int) -> Tensor:
    return batches()[index].chunk(size)[rank]


def _mean_loss_backward(model: nn.Module, index: int) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    backward(model, _ranks_batch(index, rank, size))


def _on_ranks(device: str, kind: str, policy: Any) -> Any:
    """Weights after some steps, and the norms."""
    model: nn.Module = double_model().to(device_of(device))
    make = OPTIMIZERS["sgd"]
    if kind == "ddp":
        optimizers = apply_in_backward(SGD, model, lr=LR, momentum=0.9)
        model = DistributedDataParallel(model)
    else:
        shape = (2, 2) if kind == "hsdp" else (4,)
        over = mesh(shape, ("replicas", "shards")[-len(shape) :], device)
        for block in model.blocks if kind == "fsdp2" else ():  # pyright: ignore
            fully_shard(block, mesh=over)
        fully_shard(model, mesh=over)
        optimizers = with_hooks(model, make)
    attached = distclip.Clipper(model, policy).attach_in_backward(optimizers)
    norms = []
    for index in range(4):
        # DDP asks an accelerator for its streams, also where all is on CPUs.
        with pytest.MonkeyPatch.context() as patch:
            if kind == "ddp" and not torch.accelerator.is_available():
                patch.setattr(torch.accelerator, "current_stream", MagicMock())
                patch.setattr(torch, "Stream", MagicMock())
            _mean_loss_backward(model, index)
        norms.append(attached.end_step().total_norm.item())
    assert all(p.grad is None for p in model.parameters())
    return weights(model), norms


def _late(policy: Any) -> tuple[list[Tensor], list[float]]:
    """The same with one process, and the coefficient of the step before."""
    model = double_model()
    attached = distclip.Clipper(model, policy).attach_in_backward(with_hooks(model))
    norms = []
    for batch in batches():
        backward(model, batch)
        norms.append(attached.end_step().total_norm.item())
    return weights(model), norms


RANK_POLICIES = {**PER_TENSOR, "norm": distclip.ClipNorm(0.1), "adagc": ADAGC}


@pytest.mark.parametrize("policy", RANK_POLICIES.values(), ids=RANK_POLICIES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 at once", "hsdp"])
def test_ranks_do_as_one_process(four_ranks: Ranks, kind: str, policy: Any) -> None:
    """In batches of equal size, whose mean loss is that of the whole."""
    mine, my_norms = _late(policy)
    for theirs, norms in four_ranks.run(_on_ranks, four_ranks.device, kind, policy):
        assert norms == pytest.approx(my_norms)
        same(theirs, mine)


def _errors_on_ranks() -> list[str]:
    found: list[str] = []

    def error(call: Callable[[], Any]) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as caught:
            found.append(str(caught))
        else:
            found.append("none")

    model = DistributedDataParallel(double_model())
    optimizers = with_hooks(model)
    error(lambda: distclip.Clipper(model).attach_in_backward(optimizers))
    model = DistributedDataParallel(inner := double_model())
    _mean_loss_backward(model, 0)
    optimizers = apply_in_backward(SGD, inner, lr=LR)
    error(lambda: distclip.Clipper(model).attach_in_backward(optimizers))
    beside = double_model()  # what DDP does not reduce may step in hooks
    optimizers = apply_in_backward(SGD, inner := double_model(), lr=LR)
    both = nn.ModuleList([DistributedDataParallel(inner), beside])
    distclip.Clipper(both).attach_in_backward([*optimizers, *with_hooks(beside)]).remove()
    sharded = double_model()
    fully_shard(sharded, mesh=mesh((4,), ("dp",)))
    clipper = distclip.Clipper(sharded, on_nonfinite="zero")
    error(lambda: clipper.attach_in_backward(with_hooks(sharded)))
    sharded = double_model()
    fully_shard(sharded, mesh=mesh((4,), ("dp",)))
    optimizers = apply_in_backward(SGD, sharded, lr=LR)
    attached = distclip.Clipper(sharded).attach_in_backward(optimizers)
    _mean_loss_backward(sharded, 0)
    error(attached.end_step)
    cpu = torch.device("cpu")
    flat = FullyShardedDataParallel(double_model(), device_id=cpu, use_orig_params=True)
    optimizers = [SGD([p], lr=LR) for p in flat.parameters()]
    error(lambda: distclip.Clipper(flat).attach_in_backward(optimizers))
    both, stage = mesh((2, 2), ("pp", "dp")), double_model()
    fully_shard(stage, mesh=both["dp"])
    clipper = distclip.Clipper(stage, PER_TENSOR["tensor"], mesh=both)
    error(lambda: clipper.attach_in_backward(with_hooks(stage)))
    # A fault of one rank is raised on all.
    plain = double_model()
    fully_shard(plain, mesh=mesh((4,), ("dp",)))
    attached = distclip.Clipper(plain).attach_in_backward(with_hooks(plain))
    if torch.distributed.get_rank() == 1:
        attached._fault = ValueError("only here")  # pyright: ignore
    _mean_loss_backward(plain, 0)
    error(attached.end_step)
    return found


def test_errors_on_all_ranks(four_on_cpus: Ranks) -> None:
    parts = ["DDP reduces its gradient after the hook"] * 2
    parts += ["and others would not know", "never run", "flat buffer"]
    parts += ["it is not known that the hooks run in the same order", "only here"]
    for found in four_on_cpus.run(_errors_on_ranks):
        assert len(found) == len(parts)
        for part, text in zip(parts, found, strict=True):
            assert part in text


def _nonfinite_on_ranks(device: str, policy: Any, mode: str, bad_rank: int) -> Any:
    model = double_model().to(device_of(device))
    fully_shard(model, mesh=mesh((4,), ("dp",), device))
    clipper = distclip.Clipper(model, policy, on_nonfinite=mode)  # pyright: ignore
    attached = clipper.attach_in_backward(with_hooks(model))
    _mean_loss_backward(model, 0)
    attached.end_step()
    grad_is_bad = torch.distributed.get_rank() == bad_rank
    for name, param in model.named_parameters():
        if name == "head.weight":
            hooks = param._post_accumulate_grad_hooks  # pyright: ignore
            first = {-1: lambda p: local(p.grad).mul_(float("nan") if grad_is_bad else 1)}
            param._post_accumulate_grad_hooks = {**first, **hooks}  # pyright: ignore
    _mean_loss_backward(model, 1)
    raised = ""
    try:
        attached.end_step()
    except distclip.NonFiniteGradientError as error:
        raised = str(error)
    return raised, all(w.isfinite().all() for w in weights(model))


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        (PER_TENSOR["tensor"], "zero"),
        (PER_TENSOR["tensor"], "raise"),
        (distclip.ClipNorm(0.1), "raise"),
    ],
)
def test_a_nan_on_one_rank(four_ranks: Ranks, policy: Any, mode: str) -> None:
    for raised, finite in four_ranks.run(_nonfinite_on_ranks, four_ranks.device, policy, mode, 0):
        assert finite
        assert bool(raised) == (mode == "raise")
        assert "'head.weight'" in raised or mode != "raise"


def _another_order() -> str:
    """A hook of rank 1 steps two tensors of FSDP2 the other way round."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    fully_shard(model, mesh=mesh((4,), ("dp",)))
    optimizers = [SGD([p], lr=LR) for p in model.parameters()]
    policy = distclip.ClipTensorNorm(0.1)
    attached = distclip.Clipper(model, policy).attach_in_backward(optimizers)
    model(torch.ones(2, 4)).sum().backward()
    order = optimizers if torch.distributed.get_rank() == 1 else reversed(optimizers)
    for each in order:
        each.step()
        each.zero_grad()
    try:
        attached.end_step()
    except distclip.LayoutError as error:
        return str(error)
    return ""


def test_hooks_in_another_order_on_a_rank(four_on_cpus: Ranks) -> None:
    for text in four_on_cpus.run(_another_order):
        assert "do not make the same call" in text
        assert "in backward" in text


def test_one_that_has_ended_does_not_end_the_next() -> None:
    model = make_model()
    clipper = distclip.Clipper(model, PER_TENSOR["tensor"])
    optimizers = with_hooks(model)
    first = clipper.attach_in_backward(optimizers)
    first.remove()
    second = clipper.attach_in_backward(optimizers)
    first.remove()
    with pytest.raises(ValueError, match="the Clipper is attached in backward"):
        clipper.clip_()
    second.remove()
    clipper.attach_in_backward(optimizers)
