"""Devices and the kernels that run there, each tried on gradients and compared with float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distclip
from distclip.cli.doctor.apart import Answer, Call, Check, in_words
from distclip.cli.doctor.finding import Finding

LIMIT = 1.0  # every gradient that is clipped here is longer
_TOLERANCE = 1e-5
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES, _KERNELS = "devices", "kernels"
_NUMBA_ADVICE = "pip install --force-reinstall numba numpy; or pip uninstall numba, to do without"
_NUMBA_FAILED = Finding(_KERNELS, "Numba", "unusable", "", _NUMBA_ADVICE)
_DEVICES_ADVICE = "try again with CUDA_VISIBLE_DEVICES=, to see whether a driver is the cause"
_DEVICES_FAILED = Finding(_DEVICES, "all", "unusable", "", _DEVICES_ADVICE, needed=True)


def checks() -> Iterator[Check]:
    """What each call yields are findings; one is added where a driver or a compiler crashed."""
    yield Check("devices", [Call(devices)], partial(_findings, _DEVICES_FAILED))
    yield Check("Numba", [Call(numba)], partial(_findings, _NUMBA_FAILED))


def _findings(failed: Finding, answers: list[Answer]) -> Iterator[Finding]:
    for answer in answers:
        yield from answer.values
        if answer.error:
            yield failed._replace(found=answer.error, advice=answer.advice(failed.advice))


def devices() -> Iterator[Finding]:
    """Clips on the CPU and on each accelerator; Triton's kernels where there is CUDA."""
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    yield _tried_device("CPU", "cpu", threads)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield _no_accelerator()
    else:
        for index in range(torch.accelerator.device_count()):
            name = f"{accelerator.type}:{index}"
            yield _tried_device(name.upper(), name, _device_name(accelerator.type, index))
    yield _triton(None if accelerator is None else accelerator.type)


def _tried_device(name: str, device: str, found: str) -> Finding:
    needed = device == "cpu"
    try:
        error = clip_error(torch.device(device))
    except Exception as raised:  # a driver raises anything
        advice = "train on another device; what distclip needs of one is in docs/accelerators.md"
        text = f"{found}; clipping raised {in_words(raised)}"
        return Finding(_DEVICES, name, "unusable", text, advice, needed)
    return judged(Finding(_DEVICES, name, "ok", found, needed=needed), error)


def judged(finding: Finding, error: float) -> Finding:
    """The finding with the relative error against float64, unusable where that is too large."""
    found = f"{finding.found}; clips to within {error:.0e} of float64"
    if error <= _TOLERANCE:
        return finding._replace(found=found)
    advice = "do not train with it; report this output to distclip"
    return finding._replace(status="unusable", found=found, advice=advice)


def clip_error(device: torch.device) -> float:
    """The largest relative error of the norm and of the clipped gradients, of three dtypes."""
    errors: list[float] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params = [torch.nn.Parameter(g.to(device, dtype)) for g in gradients()]
        for param in params:
            param.grad = param.detach().clone()
        whole = torch.cat([param.detach().cpu().double().flatten() for param in params])
        norm = distclip.clip_grad_norm_(params, LIMIT)
        clipped = torch.cat([_grad(param).cpu().double().flatten() for param in params])
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        right = whole * LIMIT / _length(whole)
        errors.append(abs(norm.item() / _length(whole) - 1))
        errors.append(_relative(clipped, right) - rounding)
    return worst(errors)


def worst(errors: Sequence[float]) -> float:
    """The largest; NaN if one is, which `max` may lose."""
    return torch.tensor(errors, dtype=torch.float64).amax().item()


def gradients() -> list[Tensor]:
    """A large tensor, for which kernels are compiled, and small ones; the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator) for n in (300_000, 4_097, 1)]


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _relative(found: Tensor, right: Tensor) -> float:
    return _length(found - right) / _length(right)


def _length(tensor: Tensor) -> float:
    return math.sqrt(tensor.square().sum().item())


def _device_name(kind: str, index: int) -> str:
    module: Any = torch.get_device_module(kind)
    name: Callable[[int], str] | None = getattr(module, "get_device_name", None)
    return kind if name is None else name(index)


def _no_accelerator() -> Finding:
    built = torch.version.cuda
    if built is None and _NVIDIA_DRIVER.exists():
        advice = "pip install torch with CUDA: pytorch.org/get-started/locally has the line"
        found = "an NVIDIA driver is there, and this torch is built without CUDA"
        return Finding(_DEVICES, "accelerator", "warning", found, advice)
    if built is not None and _NVIDIA_DRIVER.exists():
        advice = "see what nvidia-smi and CUDA_VISIBLE_DEVICES say; update the driver"
        found = f"an NVIDIA driver is there, and torch (CUDA {built}) finds no GPU"
        return Finding(_DEVICES, "accelerator", "warning", found, advice)
    return Finding(_DEVICES, "accelerator", "absent", "none: training runs on the CPU")


def _triton(kind: str | None) -> Finding:
    """Compiles and runs the kernels for CUDA, which clipping leaves out where they fail."""
    line = Finding(_KERNELS, "Triton", "absent", "its kernels are for CUDA devices")
    if kind != "cuda":
        return line
    if find_spec("triton") is None:
        found, advice = "not installed: clipping on CUDA is slower", "pip install triton"
        return line._replace(status="warning", found=found, advice=advice)
    try:
        from distclip.kernels import cuda

        tensors = [tensor.cuda() for tensor in gradients()]
        return judged(
            line._replace(status="ok", found=version("triton")), _kernel_error(cuda, tensors)
        )
    except Exception as error:  # of any kind, from a compiler
        advice = "install a C compiler and the Python headers, or another triton for this torch"
        return line._replace(status="unusable", found=in_words(error), advice=advice)


def numba() -> Iterator[Finding]:
    """Compiles and runs Numba's kernels, which clipping leaves out where they fail."""
    line = Finding(_KERNELS, "Numba", "absent", "not installed: clipping on a CPU is slower")
    if find_spec("numba") is None:
        yield line._replace(advice="pip install numba numpy")
        return
    from distclip.kernels import cpu_numba

    found = line._replace(status="ok", found=version("numba"))
    yield judged(found, _kernel_error(cpu_numba, gradients()))


def _kernel_error(kernels: Any, tensors: Sequence[Tensor]) -> float:
    """The relative error of the sums of squares and of scaling."""
    before = [tensor.cpu().double() for tensor in tensors]
    whole = torch.cat(before)
    sums = getattr(kernels, "squares", None)  # of Numba
    found = kernels.power_sums(tensors, 2.0) if sums is None else sums(tensors)
    kernels.scale_(tensors, torch.tensor(0.3, dtype=torch.float64, device=found.device))
    scaled = torch.cat([tensor.cpu().double() for tensor in tensors])
    right = torch.stack([tensor.square().sum() for tensor in before])
    return worst([_relative(found.cpu(), right), _relative(scaled, 0.3 * whole)])
