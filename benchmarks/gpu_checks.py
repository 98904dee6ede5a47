"""`benchmarks.gpu`: the kernels against float64, graphs, streams, deterministic mode."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product

import torch
from torch import Tensor, nn

import distclip
from benchmarks.gpu_device import Session
from distclip import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORST_NORM = 3e-7  # relative: what the documentation allows a norm that float32 has summed
# Denormals are among them; the squares of the largest overflow float32.
MAGNITUDES = {torch.float16: (1.0, 1e-6, 1e4)}
OTHER_MAGNITUDES = (1.0, 1e-20, 1e-39, 1e30)


def first_calls(session: Session) -> None:
    """What the first step would take without `prepare`: compiled anew, in an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        ones, half = (
            [torch.ones(session.pick(1 << 16, 64), device=session.device)],
            session.number(0.5),
        )
        calls: dict[str, Callable[[], object]] = {
            f"power_sums, p = {p:g}": lambda p=p: kernels.power_sums(ones, p)
            for p in (2.0, 1.0, 3.0, math.inf)
        }
        calls["norms, p = 8"] = lambda: kernels.norms(ones, 8.0)
        calls["total"] = lambda: kernels.total(half.reshape(1), 2.0)
        calls["coefficients"] = lambda: kernels.coefficients(half, half)
        calls["scale_"] = lambda: kernels.scale_(ones, half)
        calls["scale_each_"] = lambda: kernels.scale_each_(ones, half.reshape(1))
        calls["clamp_"] = lambda: kernels.clamp_(ones, half)
        calls["zero_"] = lambda: kernels.zero_(ones, half > 1)
        matrix = ones[0].view(-1, 32)
        factors = torch.ones(len(matrix), dtype=torch.float64, device=session.device)
        calls["unit_power_sums"] = lambda: kernels.unit_power_sums(matrix, 0, 2.0)
        calls["scale_units_"] = lambda: kernels.scale_units_(matrix, 0, factors)
        if session.is_cuda:
            by = kernels.backend(session.device).__name__
            session.check("Triton runs on this card", by.endswith(".cuda"), found=by)
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            session.synchronize()
            session.say(what=name, first_call_s=time.perf_counter() - began)


def sums(session: Session) -> None:
    """Every dtype, size, offset and magnitude, in one list; then what is no number."""
    sizes = session.pick((0, 1, 7, 1023, 32_768, 32_769, 100_003), (0, 7, 1030))
    tensors = [t for dtype in DTYPES for t in inputs(dtype, sizes)]
    on_device = moved(session, tensors)
    for p in (1.0, 2.0, 3.0, math.inf):
        found = kernels.power_sums(on_device, p).cpu()
        expected = torch.stack([float64_sum(t, p) for t in tensors])
        check_sums(session, f"power_sums, p = {p:g}", tensors, found, expected, p)
    found = kernels.norms(on_device, 8.0).cpu()
    expected = torch.stack([float64_norm(t, 8.0) for t in tensors])
    check_sums(session, "norms, p = 8", tensors, found, expected, math.inf)
    for value, p in product((math.nan, math.inf, -math.inf), (1.0, 2.0, 3.0, math.inf)):
        lists = [torch.ones(session.pick(50_000, 1500), dtype=dtype) for dtype in DTYPES]
        for i, tensor in enumerate(lists):
            tensor[(0, 1023, -1, 1024)[i]] = value
        found = kernels.power_sums(moved(session, lists), p).cpu()
        right = found.isnan() if math.isnan(value) else found == math.inf
        session.check(f"{value} among ones, p = {p:g}", bool(right.all()), found=found.tolist())


def check_sums(
    session: Session, what: str, tensors: Sequence[Tensor], found: Tensor, right: Tensor, p: float
) -> None:
    """By dtype: the worst error, of the norm. An empty or zero tensor has exactly 0."""
    power = 1.0 if math.isinf(p) else p
    errors = torch.where(right == 0, found.abs(), (found / right - 1).abs() / power)
    for dtype in DTYPES:
        mine = torch.tensor([t.dtype == dtype for t in tensors])
        worst = float(errors[mine].max())
        session.check(f"{what}, {dtype}", worst <= WORST_NORM, worst_relative_error=worst)


def rewrites(session: Session) -> None:
    """Scaling and clamping are rounded once; zeros are zeros; neighbours stay as they are."""
    sizes = session.pick((0, 1, 7, 1023, 32_769, 100_003), (0, 7, 1030))
    factors = session.pick((0.3, 1e-9, 1.0, 0.0), (0.3, 1.0))
    for dtype, factor in product(DTYPES, factors):
        tensors = inputs(dtype, sizes)
        got, expected = moved(session, tensors), [t.double() * factor for t in tensors]
        kernels.scale_(got, session.number(factor))
        worst = max(error(g.cpu(), e) for g, e in zip(got, expected, strict=True))
        session.check(f"scale_ by {factor:g}, {dtype}", worst <= 1.01, worst_in_ulp=worst)
        each = torch.full((len(tensors),), factor, dtype=torch.float64, device=session.device)
        got = moved(session, tensors)
        kernels.scale_each_(got, each)
        worst = max(error(g.cpu(), e) for g, e in zip(got, expected, strict=True))
        session.check(f"scale_each_ by {factor:g}, {dtype}", worst <= 1.01, worst_in_ulp=worst)
    for dtype in DTYPES:
        tensors = inputs(dtype, sizes)
        clamped, zeroed = moved(session, tensors), moved(session, tensors)
        kernels.clamp_(clamped, session.number(0.5))
        kernels.zero_(zeroed, session.number(1) > 0)
        same = [
            torch.equal(g.cpu(), t.clamp(-0.5, 0.5)) for g, t in zip(clamped, tensors, strict=True)
        ]
        session.check(f"clamp_, {dtype}", all(same))
        session.check(f"zero_, {dtype}", not any(bool(t.any()) for t in zeroed))
    whole = torch.ones(session.pick(100_000, 2000), device=session.device)
    kernels.scale_([whole[3:-5]], session.number(0.5))
    outside = torch.cat([whole[:3], whole[-5:]])
    session.check(
        "no neighbour is written", bool((outside == 1).all() and (whole[3:-5] == 0.5).all())
    )


def inputs(dtype: torch.dtype, sizes: Sequence[int]) -> list[Tensor]:
    """On the CPU. Each size at three offsets from aligned memory, in each magnitude."""
    generator, made = torch.Generator().manual_seed(0), []
    for size, offset in product(sizes, (0, 1, 3)):
        for magnitude in MAGNITUDES.get(dtype, OTHER_MAGNITUDES):
            whole = torch.randn(size + offset, generator=generator, dtype=torch.float64)
            made.append((whole * magnitude).to(dtype)[offset:])
    return made


def moved(session: Session, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the device that lie at the same offsets."""
    copies = []
    for tensor in tensors:
        offset = tensor.storage_offset()
        whole = torch.empty(offset + len(tensor), dtype=tensor.dtype, device=session.device)
        copies.append(whole[offset:].copy_(tensor))
    return copies


def float64_sum(tensor: Tensor, p: float) -> Tensor:
    wide = torch.cat([torch.zeros(1, dtype=torch.float64), tensor.double().abs()])
    return wide.max() if math.isinf(p) else wide.pow(p).sum()


def float64_norm(tensor: Tensor, p: float) -> Tensor:
    largest = float64_sum(tensor, math.inf)
    return largest * float64_sum(tensor.double() / largest, p) ** (1 / p) if largest else largest


def error(found: Tensor, expected: Tensor) -> float:
    """The largest, in units of the last place of the result's dtype; a product errs by half a unit,
    and by half a unit more where its factor was rounded to float32.
    """
    if not found.numel():
        return 0.0
    info = torch.finfo(found.dtype)
    ulp = (expected.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    return float(((found.double() - expected).abs() / ulp).max())


def model(session: Session, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    wide = session.pick(400, 9)
    layers = [nn.Linear(30, wide), nn.Linear(wide, 9, dtype=torch.bfloat16)]
    made = nn.Sequential(*layers).to(session.device)
    for param in made.parameters():
        param.grad = torch.randn_like(param)
    return made


def graphs(session: Session) -> None:
    """Captured in each mode, with the addresses of the warm-up and with new ones, and replayed."""
    modes = ("global", "thread_local", "relaxed") if session.is_cuda else ("no capture on a CPU",)
    for mode, fresh in product(modes, (False, True)):
        what = f"{mode}, {'new' if fresh else 'the same'} addresses"
        params = list(model(session).parameters())
        clipper = distclip.Clipper(params, distclip.ClipNorm(0.5))
        clipper.clip_()
        for param in params if fresh else ():
            param.grad = torch.zeros_like(param)
        replay: Callable[[], object] = clipper.clip_
        if session.is_cuda:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode=mode):
                    clipper.clip_()
            except Exception as raised:
                session.check(what, False, found=f"{type(raised).__name__}: {str(raised)[:200]}")
                session.synchronize()
                continue
            replay = graph.replay
        junk = [torch.full((1000,), 7, device=session.device) for _ in range(100)]
        for seed in (1, 2):
            torch.manual_seed(seed)
            for param in params:
                assert param.grad is not None
                param.grad.normal_()
            replay()
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
            session.check(f"{what}, replay {seed}", abs(norm / 0.5 - 1) < 2e-3, norm=norm)
        del junk  # alive until here: it has overwritten whatever capture freed


def streams(session: Session) -> None:
    """Many streams, memory that is used again at once, and one list that all of them read."""
    rounds = session.pick(400, 4)
    side = [torch.cuda.Stream() for _ in range(40 if session.is_cuda else 0)]
    shared = [torch.full((2000,), 2.0, device=session.device) for _ in range(3)]
    session.synchronize()
    right: list[Tensor] = []
    for i in range(rounds):
        with torch.cuda.stream(side[i % 40]) if side else nullcontext():
            gradients = [torch.ones(1000 + i, device=session.device) for _ in range(5)]
            found = kernels.power_sums(gradients, 2.0)
            kernels.scale_(gradients, session.number(0.5))
            scaled = torch.stack([(g == 0.5).all() for g in gradients]).all()
            of_shared = (kernels.power_sums(shared, 2.0) == 8000).all()
            right.append((found == 1000 + i).all() & scaled & of_shared)
            del gradients, found, scaled, of_shared
    session.synchronize()
    wrong = sum(not flag for flag in right)
    session.check(f"{rounds} lists on {len(side)} streams", wrong == 0, wrong=wrong)


def deterministic(session: Session) -> None:
    """`use_deterministic_algorithms` raises in no policy; the same gradients give the same bits."""
    torch.use_deterministic_algorithms(True)
    for policy in policies():
        clippers = [distclip.Clipper(model(session), policy) for _ in range(2)]
        try:
            first, second = (clipper.clip_().total_norm for clipper in clippers)
        except RuntimeError as raised:
            session.check(repr(policy), False, found=str(raised)[:300])
            continue
        grads = [[held.param.grad for held in clipper.plan.params] for clipper in clippers]
        same = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        session.check(repr(policy), same and torch.equal(first, second))


def policies() -> list[distclip.Policy]:
    inf = math.inf
    return [
        *(distclip.ClipNorm(0.5, p) for p in (2.0, 8.0, inf)),
        *(distclip.ClipTensorNorm(0.5, p) for p in (2.0, inf)),
        *(distclip.AGC(norm_type=p) for p in (2.0, inf)),
        distclip.ClipValue(0.5),
        distclip.ClipBlockRMS(0.5),
        distclip.AdaGC(),
        distclip.ZClip(),
        distclip.AutoClip(),
    ]
