"""An accelerator that is not CUDA, for machines without one: the device type "toy".

Its memory is the host's and every operator runs on the CPU, but to torch and to distclip it is
PrivateUse1, as the chips outside of torch are: `is_cpu` is false, there are two devices with
streams and events, pinned memory, and copies that arrive late. See `accelerator.cpp`.

The name of PrivateUse1 can be given once in a process, and torch then takes it as the machine's
accelerator. So tests run in processes of their own, as ranks do.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from tests.support.ranks import Ranks

NAME = "toy"
SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = os.environ.get("CXX", "g++")


class Accelerator:
    """Processes that have the device, in one gloo process group."""

    def __init__(self, size: int) -> None:
        self._ranks = Ranks(size)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returned in each process."""
        return self._ranks.run(_call, str(built()), function, args)

    def stop(self) -> None:
        self._ranks.stop()


def running(size: int) -> Iterator[Accelerator]:
    """For a fixture."""
    processes = Accelerator(size)
    yield processes
    processes.stop()


def can_be_built() -> bool:
    return shutil.which(COMPILER) is not None


@functools.cache
def built() -> Path:
    """The library; takes some 15 seconds, once on a machine and for each torch."""
    text = SOURCE.read_bytes() + f"{torch.__version__} {os.getuid()}".encode()
    folder = Path(tempfile.gettempdir()) / f"distclip-toy-{hashlib.sha1(text).hexdigest()[:16]}"
    library = folder / "accelerator.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    new = folder / f"{os.getpid()}.so"
    paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = [COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", str(SOURCE), *paths]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-o", str(new)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    new.rename(library)  # two test workers may build it at once
    return library


def _call(library: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    install(library)
    return function(*args)


@functools.cache
def install(library: str) -> types.ModuleType:
    """Makes the device known in this process; returns `torch.toy`."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    torch._register_device_module(NAME, module := _device_module(ctypes.CDLL(library)))
    torch.utils.generate_methods_for_privateuse1_backend()
    _collectives_by_the_host()
    return module


def _device_module(library: Any) -> types.ModuleType:
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 2
    module.current_device = library.current_device
    module.set_device = lambda device: library.set_current_device(torch.device(device).index or 0)
    module.device = functools.partial(_on_device, module)
    module.synchronize = lambda device=None: library.synchronize()
    module._library = library
    module.Event = functools.partial(torch.Event, NAME)
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


@contextmanager
def _on_device(module: Any, device: Any) -> Iterator[None]:
    before = module.current_device()
    module._library.set_current_device(torch.device(NAME, device).index)
    try:
        yield
    finally:
        module._library.set_current_device(before)


by_gloo = dist.all_reduce  # as torch has it


def _collectives_by_the_host() -> None:
    """gloo takes no tensors of such a device; here it takes their memory."""
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reduced(tensor: Tensor, *args: Any, **options: Any) -> Any:
        return all_reduce(host_view(tensor), *args, **options)

    def gathered(tensors: list[Tensor], tensor: Tensor, *args: Any, **options: Any) -> Any:
        return all_gather([*map(host_view, tensors)], host_view(tensor), *args, **options)

    dist.all_reduce, dist.all_gather = reduced, gathered  # type: ignore[assignment]


def host_view(tensor: Tensor) -> Tensor:
    """The memory of a tensor of the device, as a tensor of the host."""
    return torch.ops.toy.host_view(tensor.detach()) if tensor.device.type == NAME else tensor
