"""The device on which a plan combines and reduces its sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.rank_group import with_index
from distclip.torch_private import with_real_values


def reduce_device(params: Sequence[LocalParam], mesh: ReduceMesh | None) -> torch.device:
    """That of the mesh's collectives; without a mesh that of the first parameter which is on none
    of the CPUs.

    Raises:
        ValueError: it has no float64.
    """
    if mesh is not None:
        device = mesh.rank_group.device
    else:
        devices = [param.param.device for param in params if not param.param.is_meta]
        devices = devices or [param.param.device for param in params]
        chosen = next((each for each in devices if each.type != "cpu"), torch.device("cpu"))
        device = with_index(chosen)
    _check_float64(device.type)
    return device


@cache
@with_real_values()
def _check_float64(device_type: str) -> None:
    if device_type in ("cpu", "meta"):
        return
    device_module: Any = torch.get_device_module(device_type)
    if not device_module.is_available():  # in simulations, where nothing is computed
        return
    try:
        _ = torch.zeros(2, dtype=torch.float64, device=device_type) + 1
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError:  # a backend in Python, which has the operators that a test needs
        return
    except (RuntimeError, TypeError) as error:
        text = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"cannot clip on devices of type {device_type!r}: they have no float64 ({text}), and "
            f"sums of a model's squares would be wrong in float32. Clip there with "
            f"`torch.nn.utils.clip_grad_norm_`, or train on a device that has float64."
        ) from error
