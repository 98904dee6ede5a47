"""An accelerator that is neither a CPU nor CUDA: the numbers of everything that users call.

On the device of tests/support/accelerator.py, which has no Triton, and where a value that was not
waited for is garbage. The expected numbers are those of the float64 reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import distclip
from distclip import functional
from distclip.policies import Policy
from tests.support import accelerator, reference
from tests.support.accelerator import NAME, Accelerator
from tests.support.ranks import dtensors_by_the_host, mesh
from tests.support.tolerances import NORM

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not accelerator.can_be_built(), reason=f"no compiler ({accelerator.COMPILER}) here"
    ),
]

# Not the current device, which is 0: parameters say where they are.
DEVICE = f"{NAME}:1"
SHAPES = [(5, 7), (5,), (3, 5), (3,)]
CLOSE = {"rtol": 3e-7, "atol": 1e-9}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(value.to(DEVICE, dtype)) for value in values]


def set_gradients(params: Sequence[Tensor], step: int = 0) -> list[Tensor]:
    """Sets `.grad`, in some steps larger than in others; returns the values in float64."""
    generator = torch.Generator().manual_seed(100 + step)
    size = 1 + 9 * (step % 3 == 2)
    for param in params:
        param.grad = (size * torch.randn(param.shape, generator=generator)).to(param)
    return [param.grad.cpu().double() for param in params]


def scaled(grads: Sequence[Tensor], new_norm: float) -> list[Tensor]:
    return [grad * (new_norm / reference.total_norm(grads)) for grad in grads]


def each_scaled(grads: Sequence[Tensor], new_norms: Tensor) -> list[Tensor]:
    return [grad * (new / grad.norm()) for grad, new in zip(grads, new_norms, strict=True)]


Steps = list[list[Tensor]]


def expected_zclip(steps: Steps) -> Steps:
    norms = [reference.total_norm(grads).item() for grads in steps]
    return [*map(scaled, steps, reference.zclip(norms, 2.5, 0.97, 3, 5.0))]


def expected_autoclip(steps: Steps) -> Steps:
    norms = [reference.total_norm(grads).item() for grads in steps]
    return [*map(scaled, steps, reference.autoclip(norms, 50.0, 4))]


def expected_adagc(steps: Steps) -> Steps:
    norms = [[grad.norm().item() for grad in grads] for grads in steps]
    return [*map(each_scaled, steps, reference.adagc(norms, 1.04, 5.0, 0.9, 2))]


def expected_adagn(steps: Steps) -> Steps:
    norms = [[grad.norm().item() for grad in grads] for grads in steps]
    return [*map(each_scaled, steps, reference.adagn(norms, 0.7, 0.9, 1e-8))]


def expected_aggc(steps: Steps) -> Steps:
    norms = [reference.total_norm(grads).item() for grads in steps]
    return [*map(scaled, steps, reference.aggc(norms, 0.8, 1.2, 0.7, 0.5, 1.1))]


def each_step(function: Callable[..., list[Tensor]], *args: Any) -> Callable[[Steps], Steps]:
    return lambda steps: [function(grads, *args) for grads in steps]


def expected_agc(steps: Steps) -> Steps:
    weights = [param.detach().cpu() for param in parameters()]
    return [reference.agc(weights, grads, 0.5) for grads in steps]


CASES: dict[str, tuple[Policy[Any], Callable[[Steps], Steps]]] = {
    "ClipNorm": (distclip.ClipNorm(2.0), each_step(reference.clip_norm, 2.0)),
    "ClipNorm p=3": (distclip.ClipNorm(2.0, 3.0), each_step(reference.clip_norm, 2.0, 3.0)),
    "ClipNorm p=8": (distclip.ClipNorm(2.0, 8.0), each_step(reference.clip_norm, 2.0, 8.0)),
    "ClipNorm p=inf": (
        distclip.ClipNorm(2.0, math.inf),
        each_step(reference.clip_norm, 2.0, math.inf),
    ),
    "ClipValue": (distclip.ClipValue(0.5), each_step(reference.clip_value, 0.5)),
    "ClipTensorNorm": (
        distclip.ClipTensorNorm(2.0),
        each_step(reference.clip_tensor_norm, 2.0),
    ),
    "ClipBlockRMS": (distclip.ClipBlockRMS(0.9), each_step(reference.clip_block_rms, 0.9)),
    "AGC": (distclip.AGC(0.5), expected_agc),
    "ZClip": (distclip.ZClip(2.5, 0.97, 3, 5.0), expected_zclip),
    "AutoClip": (distclip.AutoClip(50.0, 4), expected_autoclip),
    "AdaGC": (distclip.AdaGC(1.04, 5.0, 0.9, 2), expected_adagc),
    "AdaGN": (distclip.AdaGN(), expected_adagn),
    "AGGC": (distclip.AGGC(0.8, 1.2, 0.7, 0.5), expected_aggc),
}


def clip_some_steps(name: str, mode: str, saved_after: int) -> None:
    policy, expected_of = CASES[name]
    params = parameters()
    clipper = distclip.Clipper(params, policy, on_nonfinite=mode)
    expected = expected_of([set_gradients(params, step) for step in range(9)])
    for step, wanted in enumerate(expected):
        grads = set_gradients(params, step)
        report = clipper.clip_(step=step)
        norm_type = policy.norm_type
        torch.testing.assert_close(
            report.total_norm.cpu().double(), reference.total_norm(grads, norm_type), **NORM
        )
        assert report.total_norm.device.type == NAME
        for param, clipped in zip(params, wanted, strict=True):
            torch.testing.assert_close(param.grad.cpu().double(), clipped, **CLOSE)
        if step == saved_after:
            saved = copy.deepcopy(clipper.state_dict())
            clipper = distclip.Clipper(params, policy, on_nonfinite=mode)
            clipper.load_state_dict(saved)


@pytest.mark.parametrize("mode", ["propagate", "raise", "skip", "zero"])
@pytest.mark.parametrize("name", CASES)
def test_policies(name: str, mode: str, on_accelerator: Accelerator) -> None:
    """With a checkpoint on the way."""
    on_accelerator.run(clip_some_steps, name, mode, 4)


def device_of_a_plan() -> str:
    return str(distclip.Clipper(parameters()).plan.device)


def test_the_device_of_the_parameters(on_accelerator: Accelerator) -> None:
    """Not the current one."""
    assert on_accelerator.run(device_of_a_plan) == [DEVICE]


def step_parameters(
    fused: bool, attached: bool, overlap: bool, mode: str, dtype: torch.dtype
) -> None:
    params = parameters(dtype)
    if overlap:  # of which one is so large that it is measured in backward
        params.append(nn.Parameter(torch.ones(512, 513, device=DEVICE, dtype=dtype)))
    clipper = distclip.Clipper(params, distclip.ClipNorm(2.0), overlap=overlap, on_nonfinite=mode)
    optimizer = torch.optim.SGD(params, 0.1, fused=fused)
    if attached:
        clipper.attach(optimizer)
    for step in range(6):
        if overlap:
            optimizer.zero_grad()
            grads = set_gradients(params, step)
            wanted = [param.grad for param in params]
            optimizer.zero_grad()
            sum((p * g).sum() for p, g in zip(params, wanted, strict=True)).backward()
        else:
            grads = set_gradients(params, step)
        before = [param.detach().cpu().double() for param in params]
        optimizer.step() if attached else clipper.step(optimizer)
        clipped = reference.clip_norm(grads, 2.0)
        for param, old, grad in zip(params, before, clipped, strict=True):
            rtol = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(
                param.detach().cpu().double(), old - 0.1 * grad, rtol=rtol, atol=rtol
            )


@pytest.mark.parametrize("mode", ["propagate", "skip"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_steps(
    fused: bool, attached: bool, overlap: bool, mode: str, on_accelerator: Accelerator
) -> None:
    on_accelerator.run(step_parameters, fused, attached, overlap, mode, torch.float32)


def step_on_both(fused: bool, mode: str) -> None:
    """Some parameters on the device, and some offloaded to the CPU."""
    params = [nn.Parameter(torch.ones(6, device=where)) for where in (DEVICE, "cpu")]
    clipper = distclip.Clipper(params, distclip.ClipNorm(2.0), on_nonfinite=mode)
    optimizer = torch.optim.AdamW(params, 0.1, fused=fused)
    grads = set_gradients(params)
    clipper.step(optimizer)
    for param, grad in zip(params, reference.clip_norm(grads, 2.0), strict=True):
        # The update itself would be the same for any factor.
        mean = optimizer.state[param]["exp_avg"].cpu().double()
        torch.testing.assert_close(mean, 0.1 * grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["propagate", "skip"])
@pytest.mark.parametrize("fused", [False, True])
def test_offloaded_parameters(fused: bool, mode: str, on_accelerator: Accelerator) -> None:
    """A fused step on the CPU reads the factor at once, wherever it was computed."""
    on_accelerator.run(step_on_both, fused, mode)


def scaler_as_torch(fused: bool) -> None:
    """Five steps under a GradScaler, of which one overflows."""
    by_torch, ours = parameters(), parameters()
    clipper = distclip.Clipper(ours, distclip.ClipNorm(2.0))
    optimizers = [torch.optim.AdamW(p, 0.1, fused=fused) for p in (by_torch, ours)]
    scalers = [torch.amp.GradScaler(NAME, init_scale=8.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        for params, scaler in zip((by_torch, ours), scalers, strict=True):
            scaler.scale(torch.ones((), device=DEVICE))
            set_gradients(params, step)
            for param in params:
                param.grad *= scaler.get_scale()
            if step == 2:
                params[1].grad[0] = math.inf
        scalers[0].unscale_(optimizers[0])
        torch.nn.utils.clip_grad_norm_(by_torch, 2.0)
        scalers[0].step(optimizers[0])
        clipper.step(optimizers[1], scalers[1])
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for param, other in zip(ours, by_torch, strict=True):
            torch.testing.assert_close(param.detach().cpu(), other.detach().cpu())


@pytest.mark.parametrize("fused", [False, True])
def test_scaler(fused: bool, on_accelerator: Accelerator) -> None:
    on_accelerator.run(scaler_as_torch, fused)


def take_steps(
    clipper: distclip.Clipper, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> None:
    for _ in range(6):
        set_gradients(params)
        clipper.step(optimizer)


def meet_nan(mode: str) -> None:
    params = parameters()
    clipper = distclip.Clipper(
        params, distclip.ClipNorm(2.0), on_nonfinite=mode, max_consecutive_skips=0
    )
    optimizer = torch.optim.SGD(params, 0.1)
    before = [param.detach().cpu() for param in params]
    grads = set_gradients(params)
    params[1].grad[2] = math.nan
    if mode == "raise":
        with pytest.raises(distclip.NonFiniteGradientError, match="the worst gradient is that of"):
            clipper.step(optimizer)
        return
    report = clipper.step(optimizer)
    assert report.total_norm.isnan().item()
    now = [param.grad.cpu() for param in params]
    steps = [not torch.equal(p.detach().cpu(), old) for p, old in zip(params, before, strict=True)]
    if mode == "propagate":
        assert all(grad.isnan().all() for grad in now)
        return
    assert not any(steps)
    assert int(clipper.skipped) == 1
    if mode == "zero":
        assert not any(grad.any() for grad in now)
    else:
        torch.testing.assert_close(now[0].double(), grads[0])
    # The host learns some steps later of a step that was one too many.
    with pytest.raises(distclip.NonFiniteGradientError):
        take_steps(clipper, optimizer, params)


@pytest.mark.parametrize("mode", ["propagate", "raise", "skip", "zero"])
def test_nan(mode: str, on_accelerator: Accelerator) -> None:
    on_accelerator.run(meet_nan, mode)


def meet_nan_without_events() -> None:
    module = torch.get_device_module(NAME)
    event = module.Event
    del module.Event
    try:
        meet_nan("skip")
    finally:
        module.Event = event


def test_a_device_module_without_events(on_accelerator: Accelerator) -> None:
    on_accelerator.run(meet_nan_without_events)


def call_functions() -> None:
    params = parameters()
    grads = set_gradients(params)

    def check(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        for tensor, wanted in zip(found, expected, strict=True):
            assert tensor.device == torch.device(DEVICE)
            torch.testing.assert_close(tensor.cpu().double(), wanted, **CLOSE)

    def grad() -> list[Tensor]:
        return [param.grad for param in params]

    total = reference.total_norm(grads)
    torch.testing.assert_close(distclip.get_total_norm(grad()).cpu().double(), total, **NORM)
    check(reference.clip_norm(grads, 2.0), functional.clip_by_global_norm(grad(), 2.0)[0])
    check([reference.clip_by_norm(grads[0], 0.5)], [functional.clip_by_norm(grad()[0], 0.5)])
    by_axis = functional.clip_by_norm(grad()[0], 0.5, axes=[1])
    check([reference.clip_by_norm(grads[0], 0.5, [1])], [by_axis])
    check([grads[0].clamp(-0.1, 0.2)], [functional.clip_by_value(grad()[0], -0.1, 0.2)])
    norm = distclip.clip_grad_norm_(params, 2.0, error_if_nonfinite=True)
    torch.testing.assert_close(norm.cpu().double(), total, **NORM)
    check(reference.clip_norm(grads, 2.0, eps=1e-6), grad())
    set_gradients(params)
    distclip.clip_grads_with_norm_(params, 2.0, norm)
    check(reference.clip_norm(grads, 2.0, eps=1e-6), grad())
    set_gradients(params)
    distclip.clip_grad_value_(params, 0.5)
    check(reference.clip_value(grads, 0.5), grad())


def test_functions(on_accelerator: Accelerator) -> None:
    on_accelerator.run(call_functions)


def clip_on_a_mesh(name: str) -> None:
    """Each rank holds half of some parameters, and a copy of the others."""
    rank, device = dist.get_rank(), torch.device(NAME, 0)
    both = mesh((2,), ("dp",), NAME)
    policy, expected_of = CASES[name]
    placements = [Replicate(), Replicate(), Shard(1), Replicate()]
    placements = [
        Shard(0) if shape[0] % 2 == 0 else p for p, shape in zip(placements, SHAPES, strict=True)
    ]

    def local(tensor: Tensor, placement: Any) -> Tensor:
        if isinstance(placement, Replicate):
            return tensor
        return tensor.tensor_split(2, placement.dim)[rank].contiguous()

    def shard(tensor: Tensor, placement: Any) -> DTensor:
        part = local(tensor, placement).to(device)
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(
            part, both, [placement], run_check=False, shape=shape, stride=stride
        )

    plain = parameters()
    params = [
        nn.Parameter(shard(p.detach().cpu(), at)) for p, at in zip(plain, placements, strict=True)
    ]
    clipper = distclip.Clipper(params, policy)
    steps = [set_gradients(plain, step) for step in range(6)]
    for grads, wanted in zip(steps, expected_of(steps), strict=True):
        for param, grad, at in zip(params, grads, placements, strict=True):
            param.grad = shard(grad.float(), at)
        report = clipper.clip_()
        total = reference.total_norm(grads, policy.norm_type)
        torch.testing.assert_close(report.total_norm.cpu().double(), total, **NORM)
        for param, clipped, at in zip(params, wanted, placements, strict=True):
            found = param.grad.to_local().cpu().double()
            torch.testing.assert_close(found, local(clipped, at), **CLOSE)


@pytest.mark.parametrize("name", ["ClipNorm", "ClipNorm p=inf", "ClipTensorNorm", "AGC", "ZClip"])
def test_on_a_mesh(name: str, on_two_accelerators: Accelerator) -> None:
    on_two_accelerators.run(clip_on_a_mesh, name)


def norms_of_tensors() -> None:
    on = mesh((2,), ("dp",), NAME)
    for policy in (distclip.ClipNorm(2.0), distclip.ClipNorm(2.0, 8.0), distclip.AGC(0.5)):
        params = parameters()
        grads = set_gradients(params)
        sharded = [nn.Parameter(DTensor.from_local(p, on, [Replicate()])) for p in params]
        wide = nn.Parameter(DTensor.from_local(torch.zeros(2, 3, device=DEVICE), on, [Shard(0)]))
        wide.grad = DTensor.from_local(torch.full((2, 3), 3.0, device=DEVICE), on, [Shard(0)])
        for param, plain in zip(sharded, params, strict=True):
            param.grad = DTensor.from_local(plain.grad, on, [Replicate()])
        clipper = distclip.Clipper([*sharded, wide], policy, tensor_norms=2)
        reports = [clipper.decide(scale=0.5).report for _ in range(3)]
        wholes = [*grads, torch.full((4, 3), 3.0)]
        expected = [reference.total_norm([each], policy.norm_type).item() / 2 for each in wholes]
        for report in reports[::2]:
            assert [*report.tensor_norms().values()] == pytest.approx(expected, rel=3e-7)
        assert reports[1].tensor_norms() == {}


def test_norms_of_tensors(on_two_accelerators: Accelerator) -> None:
    """Copies beside a shard; no value is looked at before the report is read."""
    on_two_accelerators.run(norms_of_tensors)


def reduces_before_it_measures(at: Any) -> None:
    """`Partial` gradients, of parameters in shards too: rank 1 has none of the second."""
    dtensors_by_the_host()
    on, rank = mesh((2,), ("dp",), NAME), dist.get_rank()
    like = DTensor.from_local(torch.zeros(2 if at.is_shard() else 4, device=DEVICE), on, [at])
    params = [nn.Parameter(like.clone()) for _ in range(2)]
    addend = torch.arange(1.0, 5.0, device=DEVICE)
    wholes = [torch.arange(1.0, 5.0) * n for n in (3, 1)]
    norm = reference.total_norm(wholes)
    clipper = distclip.Clipper(params, distclip.ClipNorm(1.0))
    for clip in (clipper.clip_, lambda: distclip.clip_grad_norm_(params, 1.0)) * 3:
        params[1].grad = None
        for param in params[: 2 - rank]:
            param.grad = DTensor.from_local(addend * (1 + rank), on, [Partial()])
        found = getattr(clip_result := clip(), "total_norm", clip_result)
        torch.testing.assert_close(found.cpu().double(), norm, **NORM)
        for param, whole in zip(params, wholes, strict=True):
            clipped = param.grad.full_tensor().cpu().double()
            torch.testing.assert_close(clipped, whole.double() / (norm + 1e-6), **CLOSE)
    for _ in range(2):
        unreduced = DTensor.from_local(addend, on, [Partial()])
        found = distclip.get_total_norm([unreduced]).cpu().double()
        torch.testing.assert_close(found, reference.total_norm([wholes[1] * 2]), **NORM)


@pytest.mark.parametrize("at", [Shard(0), Replicate()], ids=["sharded", "copied"])
def test_gradients_are_reduced_before_they_are_measured(
    on_two_accelerators: Accelerator, at: Any
) -> None:
    on_two_accelerators.run(reduces_before_it_measures, at)


def has_a_partial_gradient_later() -> None:
    dtensors_by_the_host()
    on, rank = mesh((2,), ("dp",), NAME), dist.get_rank()
    param = nn.Parameter(DTensor.from_local(torch.zeros(4, device=DEVICE), on, [Replicate()]))
    sharded = nn.Parameter(DTensor.from_local(torch.zeros(2, device=DEVICE), on, [Shard(0)]))
    clipper = distclip.Clipper([param, sharded], distclip.ClipNorm(1.0))
    found = []
    for step in range(6):
        at = Partial() if step == 1 and rank == 0 else Replicate()
        param.grad = DTensor.from_local(torch.full((4,), 9.0, device=DEVICE), on, [at])
        sharded.grad = torch.zeros_like(sharded)
        try:
            found.append(clipper.clip_().total_norm.item())
        except distclip.LayoutError as error:
            found.append(str(error))
            assert torch.equal(param.grad.to_local().cpu(), torch.full((4,), 9.0))
    if rank == 0:
        assert "have to be reduced first (0: (Partial(sum),)" in found[1]
    else:
        assert math.isnan(found[1])
    assert found[0] == found[2] == found[4] == 18.0
    assert "another rank has found an error" in found[5]


def test_a_partial_gradient_in_a_later_step(on_two_accelerators: Accelerator) -> None:
    """The rank that has it raises, the others as soon as they may know; nothing is clipped."""
    on_two_accelerators.run(has_a_partial_gradient_later)


def refused_by_gloo() -> str:
    try:
        accelerator.by_gloo(torch.ones(2, device=DEVICE))
    except RuntimeError as error:
        return str(error)
    return ""


def test_gloo_takes_no_such_tensors(on_accelerator: Accelerator) -> None:
    """If it does one day, the collectives need not go by the host's view of the memory."""
    assert on_accelerator.run(refused_by_gloo) != [""]
