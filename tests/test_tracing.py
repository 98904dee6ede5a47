"""Calls where torch traces or transforms: torch.compile, FakeTensorMode, meta tensors, vmap."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distclip
from distclip import functional
from tests.support import reference
from tests.support.ranks import Ranks, mesh
from tests.support.torch_versions import FAKE_ALL_GATHER

BACKENDS = ["eager", "aot_eager"]
LIMIT = 0.1


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    made(torch.ones(2, 4)).square().sum().backward()
    return made


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


# torch.compile -----------------------------------------------------------------------------------

# Each with the model, its gradients beside it, a Clipper, and what it does.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "clip_grad_norm_, list": lambda m, _: distclip.clip_grad_norm_(list(m.parameters()), LIMIT),
    "clip_grad_norm_, generator": lambda m, _: distclip.clip_grad_norm_(m.parameters(), LIMIT),
    "clip_grad_norm_, module": lambda m, _: distclip.clip_grad_norm_(m, LIMIT),
    "clip_grad_norm_, raises": lambda m, _: distclip.clip_grad_norm_(m, LIMIT, 2.0, True),
    "get_total_norm": lambda m, _: distclip.get_total_norm([p.grad for p in m.parameters()]),
    "clip_grads_with_norm_": lambda m, _: distclip.clip_grads_with_norm_(
        m.parameters(), LIMIT, torch.tensor(2.0)
    ),
    "clip_grad_value_": lambda m, _: distclip.clip_grad_value_(m.parameters(), 1e-3),
    "clip_by_norm": lambda m, _: functional.clip_by_norm(m[0].weight.grad, LIMIT),
    "clip_by_norm, axes": lambda m, _: functional.clip_by_norm(m[0].weight.grad, LIMIT, axes=[1]),
    "clip_by_global_norm": lambda m, _: functional.clip_by_global_norm(
        [p.grad for p in m.parameters()], LIMIT
    )[0],
    "clip_by_value": lambda m, _: functional.clip_by_value(m[0].weight.grad, -1e-3, 1e-3),
    "clip_": lambda _, c: c.clip_().total_norm,
    "decide, apply_": lambda _, c: c.decide().apply_(),
    "Clipper": lambda m, _: distclip.Clipper(m, distclip.AGC(0.01)).clip_().total_norm,
    "to_dict": lambda _, c: c.clip_().to_dict()["total_norm"],
}


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_a_compiled_region(
    name: str, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The region around the call is compiled, and the call does what it does elsewhere."""
    call, expected = CALLS[name], model()
    of_call = call(expected, distclip.Clipper(expected, distclip.ClipNorm(LIMIT)))
    compiled, x = model(), torch.ones(3)
    clipper = distclip.Clipper(compiled, distclip.ClipNorm(LIMIT))
    graphs: list[Any] = []

    def region(x: Tensor) -> Any:
        y = x.sin()
        answer = call(compiled, clipper)
        return y.cos(), answer

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    y, answer = torch.compile(region, backend=counting)(x)
    torch.testing.assert_close(y, x.sin().cos())
    torch.testing.assert_close(answer, of_call, rtol=0, atol=0)
    torch.testing.assert_close(gradients(compiled), gradients(expected), rtol=0, atol=0)
    ops = [node.target for graph in graphs for node in graph.graph.nodes if node.op[:4] == "call"]
    assert [getattr(op, "__name__", op) for op in ops] == ["sin", "cos"]
    assert capfd.readouterr().err == ""


STEPS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "function": lambda m, c, o: (distclip.clip_grad_norm_(m.parameters(), LIMIT), o.step())[0],
    "clip_": lambda m, c, o: (c.clip_().total_norm, o.step())[0],
    "step": lambda m, c, o: c.step(o).total_norm,
    "attach": lambda m, c, o: (o.step(), m.handle.report.total_norm)[1],
    "hooks of attach alone": lambda m, c, o: (o.step(), m.handle.report.total_norm)[1],
    "overlap": lambda m, c, o: (c.clip_().total_norm, o.step())[0],
}


def trained(how: str, backend: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """The total norm of each step, and the weights after all."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    clipper = distclip.Clipper(module, distclip.ClipNorm(LIMIT), overlap=how == "overlap")
    if "attach" in how:
        module.handle = clipper.attach(optimizer)
    if how == "hooks of attach alone":
        del vars(optimizer)["step"]  # as a framework that puts its own there

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        module(x).square().sum().backward()
        return STEPS[how](module, clipper, optimizer)

    run = step if backend is None else torch.compile(step, backend=backend)
    norms = [run(torch.full((2, 4), float(n))) for n in (1, 2, 3)]
    return norms, [p.detach().clone() for p in module.parameters()]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own, where it traces an optimizer
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", STEPS)
def test_a_compiled_training_step(how: str, backend: str) -> None:
    norms, weights = trained(how, None)
    assert min(norms) > LIMIT
    compiled_norms, compiled_weights = trained(how, backend)
    torch.testing.assert_close(compiled_norms, norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled_weights, weights, rtol=1e-6, atol=1e-7)


def compiled_on_ranks(backend: str, kind: str) -> None:
    torch._dynamo.reset()
    whole = model()
    expected = float(reference.total_norm(gradients(whole)))
    assert expected > LIMIT
    sharded = copy.deepcopy(whole)
    for part in (sharded[0], sharded[2], sharded):
        fully_shard(part, mesh=mesh((4,), ("fsdp",)))
    sharded(torch.ones(2, 4)).square().sum().backward()
    given = {"list": list, "generator": iter}.get(kind, lambda _: sharded)(sharded.parameters())

    @torch.compile(backend=backend)
    def clip(given: Any) -> Tensor:
        return distclip.clip_grad_norm_(given, LIMIT)

    assert clip(given).item() == pytest.approx(expected, rel=1e-6)
    after = [p.grad.full_tensor() for p in sharded.parameters() if isinstance(p.grad, DTensor)]
    assert float(reference.total_norm(after)) == pytest.approx(LIMIT, rel=1e-4)
    clipper = distclip.Clipper(sharded, distclip.ClipNorm(LIMIT / 2))
    report = torch.compile(clipper.clip_, backend=backend)()
    assert report.total_norm.item() == pytest.approx(LIMIT, rel=1e-4)


@pytest.mark.parametrize("kind", ["list", "generator", "module"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtensors_in_a_compiled_region(four_ranks: Ranks, backend: str, kind: str) -> None:
    four_ranks.run(compiled_on_ranks, backend, kind)


def test_import_does_not_load_dynamo() -> None:
    code = "import sys, distclip; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Tensors without values --------------------------------------------------------------------------

POLICIES = [
    distclip.ClipNorm(1.0),
    distclip.ClipNorm(1.0, 3.0),
    distclip.ClipTensorNorm(0.1),
    distclip.ClipValue(1e-3),
    distclip.AGC(0.01),
    distclip.AutoClip(),
    distclip.ZClip(),
    distclip.AdaGC(),
    distclip.AdaGN(),
    distclip.AGGC(),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def without_values(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    module = nn.Linear(width, width, dtype=dtype, device="meta" if kind == "meta" else "cpu")
    buffer = torch.zeros(width * width + width, dtype=dtype, device=module.weight.device)
    module.weight.grad = buffer[: width * width].view(width, width)
    module.bias.grad = buffer[width * width :]
    return module


@pytest.fixture(params=["fake", "meta"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "meta":
        yield "meta"
    else:
        with FakeTensorMode():
            yield "fake"


# Above some sizes other kernels run: Numba's from 2**20 elements of 16 bits.
@pytest.mark.parametrize("width", [4, 300, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_without_values(kind: str, dtype: torch.dtype, width: int) -> None:
    module = without_values(kind, width, dtype)
    norm_dtype = (torch.float32, torch.float64)
    for norm_type in (1.0, 2.0, 3.0, 1000.0, float("inf")):
        for given in (module, list(module.parameters())):
            norm = distclip.clip_grad_norm_(given, 1.0, norm_type, error_if_nonfinite=True)
            assert norm.shape == ()
            assert norm.dtype in norm_dtype
            assert type(norm) is type(torch.ones((), device=module.weight.device))
    distclip.clip_grad_value_(module, 1e-3)
    distclip.clip_grads_with_norm_(module, 1.0, norm)
    grad = module.weight.grad
    assert functional.clip_by_norm(grad, 1.0).shape == grad.shape
    assert functional.clip_by_norm(grad, 1.0, axes=[1]).dtype is dtype
    assert functional.clip_by_global_norm([grad], 1.0)[0][0].shape == grad.shape
    assert functional.clip_by_value(grad, -1.0, 1.0).shape == grad.shape


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_clippers_without_values(kind: str, policy: Any) -> None:
    module = without_values(kind, 300, torch.float32)
    for mode in ("propagate", "raise", "skip", "zero"):
        clipper = distclip.Clipper(module, policy, on_nonfinite=mode)
        for _ in range(2):
            assert clipper.clip_(scale=0.5).total_norm.shape == ()


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_without_values(kind: str, make: Any, options: dict[str, bool]) -> None:
    if kind == "meta" and "fused" in options:
        pytest.skip("torch has no fused optimizers on the meta device")
    module = without_values(kind, 300, torch.float32)
    optimizer = make(module.parameters(), lr=0.1, **options)
    for mode in ("propagate", "skip"):
        clipper = distclip.Clipper(module, on_nonfinite=mode)
        assert clipper.step(optimizer).total_norm.shape == ()
        handle = clipper.attach(optimizer)
        optimizer.step()
        handle.remove()
        assert handle.report.total_norm.shape == ()


def test_a_scaler_and_overlap_without_values() -> None:
    with FakeTensorMode():
        module = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cpu")
        clipper = distclip.Clipper(module, overlap=True)
        scaler.scale(module(torch.ones(2, 4)).sum()).backward()
        assert clipper.step(optimizer, scaler).total_norm.shape == ()


def test_real_gradients_after_fake_ones() -> None:
    """Plans are kept: what was made for fake tensors has to measure real ones."""
    with FakeTensorMode():
        distclip.clip_grad_norm_(without_values("fake", 4, torch.float32), 1.0)
    module = model()
    expected = float(reference.total_norm(gradients(module)))
    assert distclip.clip_grad_norm_(module, 1.0).item() == pytest.approx(expected, rel=1e-6)


# torch.func --------------------------------------------------------------------------------------

BATCH = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [torch.nan, 1.0]])
OVER_VMAP: dict[str, Callable[[Tensor], Tensor]] = {
    "clip_by_norm": lambda t: functional.clip_by_norm(t, 1.0),
    "clip_by_norm, axes": lambda t: functional.clip_by_norm(t, 1.0, axes=[0]),
    "clip_by_global_norm": lambda t: torch.stack(
        functional.clip_by_global_norm([t, t.flip(0)], 1.0)[0]
    ),
    "its norm": lambda t: functional.clip_by_global_norm([t, t.flip(0)], 1.0)[1],
    "use_norm": lambda t: functional.clip_by_global_norm([t], 1.0, use_norm=t.sum())[0][0],
    "clip_by_value": lambda t: functional.clip_by_value(t, -1.0, 1.0),
    "get_total_norm": lambda t: distclip.get_total_norm([t, 2 * t]),
    "its maximum": lambda t: distclip.get_total_norm([t], float("inf")),
}


@pytest.mark.parametrize("in_dims", [0, 1])
@pytest.mark.parametrize("name", OVER_VMAP)
def test_vmap_is_a_call_for_each(name: str, in_dims: int) -> None:
    call = OVER_VMAP[name]
    expected = torch.stack([call(t) for t in BATCH])
    batch = BATCH if in_dims == 0 else BATCH.t().contiguous()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop")
        found = torch.func.vmap(call, in_dims=in_dims)(batch)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-6, atol=0)


def test_per_sample_gradients_are_clipped_under_vmap() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return ((weights["a"] * x).sum() + weights["b"]) ** 2

    def clipped(x: Tensor) -> Tensor:
        grads = torch.func.grad(loss)(weights, x)
        found, _ = functional.clip_by_global_norm(list(grads.values()), 1.0)
        return torch.cat([found[0], found[1].view(1)])

    each = torch.func.vmap(clipped)(BATCH[:3])
    torch.testing.assert_close(each.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(each, torch.stack([clipped(x) for x in BATCH[:3]]))


FSDP2_WITHOUT_VALUES = """
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import distclip

dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
with FakeTensorMode(allow_non_fake_inputs=True):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    model(torch.ones(2, 16)).square().sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    norms = [distclip.clip_grad_norm_(list(model.parameters()), 1.0)]
    for policy in (distclip.ClipNorm(1.0), distclip.AGC(0.01), distclip.AdaGC(), distclip.ZClip()):
        clipper = distclip.Clipper(model, policy)
        norms += [clipper.clip_().total_norm, clipper.step(optimizer).total_norm]
print([type(norm).__name__ for norm in norms] == ["FakeTensor"] * 9)
"""


@FAKE_ALL_GATHER.skips
def test_an_estimate_of_memory_under_fsdp2() -> None:
    """As trainers make it: one process that stands for all ranks."""
    command = [sys.executable, "-c", FSDP2_WITHOUT_VALUES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
