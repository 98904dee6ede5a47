"""`benchmarks.gpu`: the kernels against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu_device import Session
from distclip import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORST_NORM = 3e-7  # relative: what the documentation allows a norm that float32 has summed
# Denormals are among them; the squares of the largest overflow float32.
MAGNITUDES = {torch.float16: (1.0, 1e-6, 1e4)}
OTHER_MAGNITUDES = (1.0, 1e-20, 1e-39, 1e30)


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
    odd = [torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype) for dtype in DTYPES]
    got = moved(session, odd)
    kernels.scale_(got, session.number(0.5))
    right = all(
        g.cpu().isnan()[0] and g.cpu().tolist()[1:] == [math.inf, -math.inf, 0.5] for g in got
    )
    session.check("scale_ of NaN and infinity", right)
    kernels.zero_(got, session.number(1) > 0)
    session.check("zero_ of NaN and infinity", not any(g.cpu().any() for g in got))
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
