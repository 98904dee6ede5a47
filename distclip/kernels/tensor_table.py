"""Where the tensors of a list lie: the table by which one launch finds all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 15  # elements a program: by arithmetic, not yet by measurement
COLUMNS = 6  # one is unused: rows of 48 bytes leave what follows aligned, or Triton would compile a second variant
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_SIZES = torch.tensor([dtype.itemsize for dtype in DTYPES], device="cpu")  # whatever the default device is
_ALIGNED = 16  # bytes: the widest load
_ELSEWHERE = (-1, 0, 0)

# A CUDA graph reads its tables, and uploads them from the host, at each replay; nobody tells when the graph is gone.
_captured: list[Tensor] = []


class Table(NamedTuple):
    """A list of tensors, cut into chunks that begin at multiples of 16 bytes, on their device.

    Attributes:
        rows: of each tensor: its address rounded down to 16 bytes; from there, in elements, where it begins and
            ends; the place of its dtype in DTYPES; its first chunk. A last row holds the number of chunks.
        owners: of each chunk, its tensor.
        others: which tensors it cannot hold: those of other dtypes, and those with gaps. Here they are empty.

    Shapes: rows: [num + 1, COLUMNS]; owners: [num_chunks]; int64.
    """

    rows: Tensor
    owners: Tensor
    others: Sequence[int]


def table(tensors: Sequence[Tensor]) -> Table:
    """The table of tensors of one device.

    It is kept while addresses stay, and uploaded without waiting for the device when they change. It holds no tensor
    alive. Under CUDA-graph capture it is made anew and kept, some bytes a tensor, until the process ends.
    """
    device = tensors[0].device
    places = tuple([_place(t) for t in tensors])
    if device.type != "cuda":
        return _kept(device, 0, places)
    if torch.cuda.is_current_stream_capturing():
        return _made(device, places, capturing=True)
    # A table is ready for the stream that uploaded it, and for no other.
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, places)


def _place(tensor: Tensor) -> tuple[int, int, int]:
    code = _CODES.get(tensor.dtype)
    if code is None or not (tensor.is_contiguous() or _is_dense(tensor)):
        return _ELSEWHERE
    return tensor.data_ptr(), tensor.numel(), code


@lru_cache(maxsize=32)
def _kept(device: torch.device, stream: int, places: tuple[tuple[int, int, int], ...]) -> Table:
    return _made(device, places, capturing=False)


def _made(device: torch.device, places: tuple[tuple[int, int, int], ...], capturing: bool) -> Table:
    address, numel, code = torch.tensor(places, dtype=torch.int64, device="cpu").unbind(1)
    size = _SIZES[code]
    head = address % _ALIGNED // size
    num_chunks = torch.where(numel > 0, (head + numel + CHUNK - 1) // CHUNK, 0)
    rows = torch.zeros(len(places) + 1, COLUMNS, dtype=torch.int64, device="cpu")
    rows[:-1, :4] = torch.stack([address - head * size, head, head + numel, code], dim=1)
    rows[1:, 4] = num_chunks.cumsum(0)
    owners = torch.arange(len(places), device="cpu").repeat_interleave(num_chunks)
    there = _uploaded(torch.cat([rows.flatten(), owners]), device, capturing)
    others = [i for i, place in enumerate(places) if place == _ELSEWHERE]
    return Table(there[: rows.numel()].view_as(rows), there[rows.numel() :], others)


def _uploaded(host: Tensor, device: torch.device, capturing: bool) -> Tensor:
    if device.type == "cpu":
        return host
    if capturing:  # no pinned memory: to find some, its allocator asks for events, which capture forbids
        there = host.to(device, non_blocking=True)
        _captured.extend([host, there])
        return there
    return host.pin_memory().to(device, non_blocking=True)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side in some order of the dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
