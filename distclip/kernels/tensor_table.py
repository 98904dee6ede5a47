"""The addresses of a list of tensors, in a table by which one launch reaches all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.kernels.upload import reserve, upload

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# int64 in each row: 48 bytes, after which the next array is aligned to 16 bytes.
ROW_SIZE = 6
# Elements for each program, by arithmetic and not yet by measurement. Half as many where all would
# be few programs for each processor of a device, of which the last ones run alone.
CHUNK, SMALL_CHUNK = 1 << 15, 1 << 14
_FEW = 500_000_000  # elements
_MOST_TABLES, _MOST_BYTES = 4096, 1 << 25  # that are kept

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_SIZES = torch.tensor([dtype.itemsize for dtype in DTYPES], device="cpu")  # not the default device
_ALIGNED = 16  # bytes: the widest load
_dtype = attrgetter("dtype")


class Launch(NamedTuple):
    """The chunks of one dtype, which have numbers in a row. `code` is its index in DTYPES."""

    code: int
    first_chunk: int
    num_chunks: int


class Table(NamedTuple):
    """A list of tensors, cut into chunks that begin at multiples of 16 bytes, on their device.

    Attributes:
        rows: for each tensor: its address rounded down to 16 bytes; its begin and its end, in
            elements from there; its first chunk, and the chunk after its last one; the elements of
            a chunk.
        owners: the index of each chunk's tensor.
        launches: the chunks of each dtype.
        others: the indices of the tensors that a table cannot hold, because of their dtype or of
            gaps between their elements. Here they are empty.

    Shapes: rows: [num, ROW_SIZE]; owners: [num_chunks]; int64.
    """

    rows: Tensor
    owners: Tensor
    launches: Sequence[Launch]
    others: Sequence[int]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.owners.nbytes


class _Key(NamedTuple):
    """All that a table is made of, for each tensor. `dense` is None where all are contiguous."""

    device: torch.device
    addresses: tuple[int, ...]
    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    dense: tuple[bool, ...] | None


class _Kept:
    """A table, and the streams that may read it."""

    def __init__(self, key: _Key) -> None:
        self.key, self.table = key, _new(key)
        self._streams: set[int] = set()
        if key.device.type == "cuda":
            stream = torch.cuda.current_stream(key.device)
            self._streams.add(stream.cuda_stream)
            self._uploaded = torch.cuda.Event()
            self._uploaded.record(stream)

    def order(self, stream: torch.cuda.Stream) -> None:
        """What `stream` does next may read the table, whose memory then waits for it."""
        if stream.cuda_stream not in self._streams:
            stream.wait_event(self._uploaded)
            self.table.rows.record_stream(stream)  # `owners` lie in the same memory
            self._streams.add(stream.cuda_stream)


class TensorList(list[Tensor]):
    """A list of tensors that remembers its table."""

    kept: _Kept | None = None


def table(tensors: Sequence[Tensor]) -> Table:
    """The table of tensors of one device, the current one. It keeps none of them alive.

    It is kept while addresses stay, and uploaded without a wait for the device when they change.
    Any stream may use it. A CUDA graph under capture gets its own.
    """
    key = _key(tensors)
    if key.device.type != "cuda":
        return _find(tensors, key).table
    if torch.cuda.is_current_stream_capturing():
        return _new(key)
    kept = _find(tensors, key)
    kept.order(torch.cuda.current_stream(key.device))
    reserve(kept.table.nbytes)
    return kept.table


def _key(tensors: Sequence[Tensor]) -> _Key:
    """Every function is one of C, because this runs for each tensor in each step."""
    addresses = tuple(map(Tensor.data_ptr, tensors))
    numels, dtypes = tuple(map(Tensor.numel, tensors)), tuple(map(_dtype, tensors))
    dense = tuple(map(Tensor.is_contiguous, tensors))
    if all(dense):
        return _Key(tensors[0].device, addresses, numels, dtypes, None)
    dense = tuple([is_so or _is_dense(t) for is_so, t in zip(dense, tensors, strict=True)])
    return _Key(tensors[0].device, addresses, numels, dtypes, dense)


class _Tables:
    """Those that were used last. The list of a step may be long, or each tensor have a table."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()  # autograd calls from its own threads

    def find(self, key: _Key) -> _Kept:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = _Kept(key)
                self._nbytes += kept.table.nbytes
                self._forget_old()
            else:
                self._kept.move_to_end(key)
            return kept

    def _forget_old(self) -> None:
        while len(self._kept) > 1:
            if len(self._kept) <= _MOST_TABLES and self._nbytes <= _MOST_BYTES:
                return
            _, old = self._kept.popitem(last=False)
            self._nbytes -= old.table.nbytes


_tables = _Tables()


def _find(tensors: Sequence[Tensor], key: _Key) -> _Kept:
    if not isinstance(tensors, TensorList):
        return _tables.find(key)
    if tensors.kept is None or tensors.kept.key != key:
        tensors.kept = _tables.find(key)
    return tensors.kept


def _new(key: _Key) -> Table:
    codes = [_CODES.get(dtype, -1) for dtype in key.dtypes]
    if key.dense is not None:
        codes = [c if is_so else -1 for c, is_so in zip(codes, key.dense, strict=True)]
    others = [i for i, code in enumerate(codes) if code < 0]
    numels = [0 if code < 0 else n for n, code in zip(key.numels, codes, strict=True)]
    columns = torch.tensor([key.addresses, numels, codes], dtype=torch.int64, device="cpu")
    address, numel, code = columns
    size = _SIZES[code]  # of the last dtype for -1
    head = address % _ALIGNED // size
    chunk = SMALL_CHUNK if int(numel.sum()) < _FEW else CHUNK
    counts = torch.where(numel > 0, (head + numel + chunk - 1) // chunk, 0)
    order = code.argsort(stable=True)  # the chunks of a dtype follow each other
    last = torch.zeros_like(counts).index_copy_(0, order, counts[order].cumsum(0))
    begin, chunks = address - head * size, torch.full_like(counts, chunk)
    rows = torch.stack([begin, head, head + numel, last - counts, last, chunks], dim=1)
    owners = order.repeat_interleave(counts[order])
    uploaded = upload(torch.cat([rows.flatten(), owners]), key.device)
    launches: list[Launch] = []
    first = 0
    for each in sorted(set(codes) - {-1}):
        if num_chunks := int(counts[code == each].sum()):
            launches.append(Launch(each, first, num_chunks))
            first += num_chunks
    return Table(uploaded[: rows.numel()].view_as(rows), uploaded[rows.numel() :], launches, others)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in some order of the dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
