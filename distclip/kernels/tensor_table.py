"""The addresses of a list of tensors, in a table by which one launch reaches all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.kernels.upload import upload

CHUNK = 1 << 15  # elements for each program: by arithmetic, not yet by measurement
# int64 in each row. One is unused: after rows of 48 bytes the next array is aligned to 16 bytes.
# Otherwise Triton would compile a second variant.
ROW_SIZE = 6
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_SIZES = torch.tensor([dtype.itemsize for dtype in DTYPES], device="cpu")  # not the default device
_ALIGNED = 16  # bytes: the widest load


class _Entry(NamedTuple):
    """One tensor of a table. `code` is the index of its dtype in DTYPES."""

    address: int
    numel: int
    code: int


_NO_ENTRY = _Entry(-1, 0, 0)


class Table(NamedTuple):
    """A list of tensors, cut into chunks that begin at multiples of 16 bytes, on their device.

    Attributes:
        rows: for each tensor: its address rounded down to 16 bytes; its begin and its end, in
            elements from there; the index of its dtype in DTYPES; its first chunk. One more row
            holds the number of chunks.
        owners: the index of each chunk's tensor.
        others: the indices of the tensors that a table cannot hold, because of their dtype or of
            gaps between their elements. Here they are empty.

    Shapes: rows: [num + 1, ROW_SIZE]; owners: [num_chunks]; int64.
    """

    rows: Tensor
    owners: Tensor
    others: Sequence[int]


def table(tensors: Sequence[Tensor]) -> Table:
    """The table of tensors of one device. It keeps none of them alive.

    It is kept while addresses stay, and uploaded without a wait for the device when they change. A
    CUDA graph under capture gets its own table, some bytes a tensor, which is kept until the
    process ends.
    """
    device = tensors[0].device
    entries = tuple([_entry(t) for t in tensors])
    if device.type != "cuda":
        return _kept(device, 0, entries)
    if torch.cuda.is_current_stream_capturing():
        return _new(device, entries)
    # Only the stream that uploaded a table may read it without a wait.
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, entries)


def _entry(tensor: Tensor) -> _Entry:
    code = _CODES.get(tensor.dtype)
    if code is None or not (tensor.is_contiguous() or _is_dense(tensor)):
        return _NO_ENTRY
    return _Entry(tensor.data_ptr(), tensor.numel(), code)


@lru_cache(maxsize=32)
def _kept(device: torch.device, stream: int, entries: tuple[_Entry, ...]) -> Table:
    return _new(device, entries)


def _new(device: torch.device, entries: tuple[_Entry, ...]) -> Table:
    address, numel, code = torch.tensor(entries, dtype=torch.int64, device="cpu").unbind(1)
    size = _SIZES[code]
    head = address % _ALIGNED // size
    num_chunks = torch.where(numel > 0, (head + numel + CHUNK - 1) // CHUNK, 0)
    rows = torch.zeros(len(entries) + 1, ROW_SIZE, dtype=torch.int64, device="cpu")
    rows[:-1, :4] = torch.stack([address - head * size, head, head + numel, code], dim=1)
    rows[1:, 4] = num_chunks.cumsum(0)
    owners = torch.arange(len(entries), device="cpu").repeat_interleave(num_chunks)
    uploaded = upload(torch.cat([rows.flatten(), owners]), device)
    others = [i for i, entry in enumerate(entries) if entry == _NO_ENTRY]
    return Table(uploaded[: rows.numel()].view_as(rows), uploaded[rows.numel() :], others)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in some order of the dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
