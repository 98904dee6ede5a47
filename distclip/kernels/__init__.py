"""Loops over the elements of gradients, with one module for each kind of device.

Kernels take dense tensors. They know no policy, no layout and no rank. `naive` defines what is
correct, and the other modules compute the same faster. Here are the functions of `Backend`, each
of which uses the backend of its tensors' device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from threading import RLock

import torch
from torch import Tensor

from distclip.kernels import cpu, foreach, naive
from distclip.kernels.backend import Backend as Backend
from distclip.kernels.backend import Total as Total
from distclip.kernels.contiguous import grouped
from distclip.torch_private import has_values, is_transformed

DEFINITION: Backend = naive  # the other backends are tested against it

_choosing = RLock()  # two threads must not both try Triton


def backend(device: torch.device) -> Backend:
    """The fastest backend that runs on `device`.

    The first call for a CUDA device tries Triton there and may compile for some seconds. A backend
    is chosen once per device and process, by whichever thread comes first.

    Raises:
        RuntimeError: the first call for a device is made during the capture of a CUDA graph, in
            which no kernel can be compiled.

    Warns:
        UserWarning: Triton is installed but fails on this device.
    """
    with _choosing:
        return _choose(device)


def prepare(tensors: Sequence[Tensor], norm_type: float) -> None:
    """`Backend.prepare` for tensors of any devices."""
    for on_device in _by_device(tensors):
        _backend_of(on_device).prepare(on_device, norm_type)


def tensor_lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """`Backend.tensor_lists` for tensors of any devices; the tensors of a list lie on one."""
    lists: list[list[Tensor]] = []
    for on_device in _by_device(tensors):
        lists += _backend_of(on_device).tensor_lists(on_device)
    return lists


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """See `Backend.power_sums`."""
    return _backend_of(tensors).power_sums(tensors, norm_type)


def power_sums_where(
    tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
) -> Tensor:
    """See `Backend.power_sums_where`."""
    return _backend_of(tensors).power_sums_where(tensors, norm_type, where, otherwise)


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """See `Backend.norms`."""
    return _backend_of(tensors).norms(tensors, norm_type)


def total(power_sums: Tensor, norm_type: float) -> Total:
    """See `Backend.total`."""
    return _backend_of([power_sums]).total(power_sums, norm_type)


def coefficients(norms: Tensor, limits: Tensor) -> Tensor:
    """See `Backend.coefficients`."""
    return _backend_of([norms]).coefficients(norms, limits)


def prepare_units(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> None:
    """`Backend.prepare_units` for tensors of any devices."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        on_device = [tensors[i] for i in here]
        _backend_of(on_device).prepare_units(on_device, [dims[i] for i in here], norm_type)


def unit_power_sums(
    tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
) -> Tensor:
    """See `Backend.unit_power_sums`."""
    return _backend_of(tensors).unit_power_sums(tensors, dims, norm_type)


def unit_norms(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> Tensor:
    """See `Backend.unit_norms`."""
    return _backend_of(tensors).unit_norms(tensors, dims, norm_type)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See `Backend.scale_`."""
    _backend_of(tensors).scale_(tensors, coefficient)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """See `Backend.scale_each_`."""
    _backend_of(tensors).scale_each_(tensors, coefficients)


def scale_units_(
    tensors: Sequence[Tensor], dims: Sequence[int | None], coefficients: Tensor
) -> None:
    """See `Backend.scale_units_`."""
    _backend_of(tensors).scale_units_(tensors, dims, coefficients)


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """See `Backend.clamp_`."""
    _backend_of(tensors).clamp_(tensors, bound)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """See `Backend.zero_`."""
    _backend_of(tensors).zero_(tensors, where)


def _backend_of(tensors: Sequence[Tensor]) -> Backend:
    if not tensors:
        return cpu
    if is_transformed(tensors[0]):
        return naive  # its operators are those that `vmap` has
    # Fake tensors name a device, but have no memory there.
    return backend(tensors[0].device) if has_values(tensors[0]) else foreach


@cache  # no error is kept
def _choose(device: torch.device) -> Backend:
    if device.type == "cpu":
        return cpu
    return (_triton(device) if device.type == "cuda" else None) or foreach


def _triton(device: torch.device) -> Backend | None:
    """None where Triton is missing or fails; it may know neither the chip nor a C compiler."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_capturing(device))
    try:
        from distclip.kernels import cuda

        cuda.prepare([torch.ones(1, device=device)], 2.0)
    except ImportError:
        return None
    except Exception as error:  # Triton raises errors of any kind, and training should go on
        if "captur" in str(error):  # by another thread, which forbids this one to load a kernel
            raise RuntimeError(_capturing(device)) from error
        warnings.warn(
            f"Triton does not run on {device}. Clipping works but is slower there: {error!r}",
            stacklevel=4,
        )
        return None
    return cuda


def _capturing(device: torch.device) -> str:
    return (
        f"cannot choose the kernels for {device} during the capture of a CUDA graph: they have to "
        "be compiled and tried, which a capture forbids. Make the Clipper and run one step before "
        "the capture."
    )


def _by_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    if all(map(attrgetter("is_cpu"), tensors)):  # three times as fast as to compare devices
        return [list(tensors)] if tensors else []
    return grouped(tensors, attrgetter("device"))
