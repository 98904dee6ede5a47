"""The table by which one launch reaches all the tensors of a list."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distclip.kernels import naive, tensor_table
from tests.support.drawn import given
from tests.support.drawn import strategies as st

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("distclip.kernels.cuda")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = tensor_table.DTYPES


def test_a_table_is_kept_while_addresses_stay() -> None:
    tensors = [torch.randn(5, device=DEVICE), torch.randn(7, device=DEVICE).bfloat16()]
    first = tensor_table.table(tensors)
    assert tensor_table.table([t.view(-1) for t in tensors]) is first
    moved = [tensors[0], torch.randn(7, device=DEVICE).bfloat16()]
    assert tensor_table.table(moved) is not first
    assert tensor_table.table([tensors[0][:4], tensors[1]]) is not first
    assert tensor_table.table([tensors[0], tensors[1].view(torch.float16)]) is not first
    for either in (moved, tensors):
        torch.testing.assert_close(cuda.power_sums(either, 2.0), naive.power_sums(either, 2.0))


def test_the_default_device_does_not_matter() -> None:
    tensors = [torch.randn(5, device=DEVICE)]
    with torch.device("meta"):
        sums = cuda.power_sums(tensors, 2.0)
    torch.testing.assert_close(sums, naive.power_sums(tensors, 2.0))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the tables that are made."""
    lengths: list[int] = []
    original = tensor_table._new

    def counted(key: tensor_table._Key) -> tensor_table.Table:
        lengths.append(len(key.addresses))
        return original(key)

    monkeypatch.setattr(tensor_table, "_new", counted)
    return lengths


def check(tensors: list[Tensor]) -> None:
    """Sums and products of what the tensors are now."""
    torch.testing.assert_close(cuda.power_sums(tensors, 2.0), naive.power_sums(tensors, 2.0))
    expected = [t.clone() for t in tensors]
    half = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    cuda.scale_(tensors, half)
    naive.scale_(expected, half)
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


def swap_storage(tensor: Tensor) -> None:
    tensor.data = torch.randn_like(tensor)


def set_storage(tensor: Tensor) -> None:
    tensor.set_(torch.randn(300, device=DEVICE))


def set_with_gaps(tensor: Tensor) -> None:
    """As many elements from the same address on."""
    tensor.set_(tensor.untyped_storage(), 0, (10, 10), (20, 2))


def transpose(tensor: Tensor) -> None:
    tensor.transpose_(0, 1)


def shrink(tensor: Tensor) -> None:
    tensor.resize_(3, 7)


def grow(tensor: Tensor) -> None:
    tensor.resize_(40, 70).fill_(0.25)


def other_dtype(tensor: Tensor) -> None:
    tensor.data = tensor.data.half().resize_(tensor.shape)


def same_bits_of_another_dtype(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(torch.float16).view(-1)[:100].view(10, 10).fill_(3.0)


CHANGES = [swap_storage, set_storage, set_with_gaps, transpose, shrink, grow, other_dtype]
CHANGES += [same_bits_of_another_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_no_table_is_stale(change: Callable[[Tensor], None]) -> None:
    tensors = [torch.randn(10, 20, device=DEVICE)[:, :10].clone() for _ in range(3)]
    tensors[1].resize_(40, 70).fill_(1.0).resize_(10, 10)  # room to grow at the same address
    (listed,) = cuda.tensor_lists(tensors)
    check(listed)
    change(listed[1])
    check(listed)


def test_no_list_is_stale() -> None:
    """Neither where a tensor takes the place of another."""
    (listed,) = cuda.tensor_lists([torch.randn(5, device=DEVICE) for _ in range(3)])
    check(listed)
    listed[1] = torch.randn(9, device=DEVICE)
    check(listed)
    listed.append(torch.randn(4, device=DEVICE))
    check(listed)


def test_a_list_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    find = tensor_table._tables.find
    monkeypatch.setattr(tensor_table._tables, "find", lambda key: found.append(key) or find(key))
    (listed,) = cuda.tensor_lists([torch.randn(n, device=DEVICE) for n in (5, 7)])
    assert type(listed[:1]) is list  # a part has no table
    check(listed)
    check(listed)
    assert len(found) == 1


def test_a_table_for_each_tensor_is_kept(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one measures while a backward runs."""
    monkeypatch.setattr(tensor_table, "_tables", tensor_table._Tables())
    tensors = [torch.randn(5, device=DEVICE) for _ in range(300)]
    for _ in range(3):
        for tensor in tensors:
            tensor_table.table([tensor])
        tensor_table.table(tensors)
    assert sorted(made) == [1] * 300 + [300]


def test_tables_are_bounded_and_hold_no_gradient(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = tensor_table._Tables()
    monkeypatch.setattr(tensor_table, "_tables", tables)
    monkeypatch.setattr(tensor_table, "_MOST_TABLES", 20)
    tensors = [torch.randn(5, device=DEVICE) for _ in range(40)]
    for tensor in tensors:
        tensor_table.table([tensor])
    assert len(tables._kept) == 20
    one = tensor_table.table(tensors[-1:]).nbytes
    assert tables._nbytes == 20 * one == 20 * (tensor_table.ROW_SIZE + 1) * 8
    tensor_table.table(tensors[20:21])  # used again: the others are older
    monkeypatch.setattr(tensor_table, "_MOST_BYTES", 10 * one)
    tensor_table.table(tensors[:1])
    assert len(tables._kept) == 10
    made.clear()
    tensor_table.table(tensors[20:21])
    assert not made
    tensor_table.table(tensors)  # more bytes than all that may be kept
    tensor_table.table(tensors)
    assert made == [40]
    assert len(tables._kept) == 1
    dead = weakref.ref(tensors[0])
    del tensors[0], tensor
    gc.collect()
    assert dead() is None


class Stream:
    """A stream of a device that this machine lacks."""

    def __init__(self, cuda_stream: int, log: list[tuple[str, int]]) -> None:
        self.cuda_stream, self._log = cuda_stream, log

    def wait_event(self, event: object) -> None:
        self._log.append(("waits", self.cuda_stream))


def test_streams_share_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each other stream waits for the upload once, and its work keeps the memory from reuse."""
    log: list[tuple[str, int]] = []
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: log.append(("uses", stream.cuda_stream))
    )
    kept = tensor_table._Kept(tensor_table._key([torch.randn(5)]))
    uploaded: Any = object()
    kept._uploaded, kept._streams = uploaded, {1}
    for stream in (1, 2, 3, 2, 1, 3):
        shared: Any = Stream(stream, log)
        kept.order(shared)
    assert log == [("waits", 2), ("uses", 2), ("waits", 3), ("uses", 3)]


def test_a_capture_gets_its_own_tables(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in the memory of the graph: nothing may find them later, not even the same list."""
    key, log = tensor_table._key, list[tuple[str, int]]()
    on_cuda = torch.device("cuda", 0)
    monkeypatch.setattr(tensor_table, "_key", lambda t: key(t)._replace(device=on_cuda))
    monkeypatch.setattr(tensor_table, "_tables", tensor_table._Tables())
    monkeypatch.setattr(tensor_table, "upload", lambda host, device: host)
    monkeypatch.setattr(tensor_table, "reserve", lambda nbytes: log.append(("reserve", nbytes)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(3, log))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    (listed,) = cuda.tensor_lists([torch.randn(5), torch.randn(7)])
    captured = [tensor_table.table(listed) for _ in range(2)]
    assert made == [2, 2]
    assert not log
    capturing = False
    eager = tensor_table.table(listed)
    assert tensor_table.table(listed) is tensor_table.table(list(listed)) is eager
    assert made == [2, 2, 2]
    assert log == [("reserve", eager.nbytes)] * 3
    capturing = True
    tables = [*captured, eager, tensor_table.table(listed)]
    assert len({id(table) for table in tables}) == 4


@pytest.mark.parametrize(
    ("numels", "chunk"),
    [
        ([499_999_999], tensor_table.SMALL_CHUNK),
        ([250_000_000, 250_000_000], tensor_table.CHUNK),
        ([5_000_000_000], tensor_table.CHUNK),
    ],
)
def test_chunks_are_smaller_where_all_are_few(numels: list[int], chunk: int) -> None:
    table = tensor_table._new(key_of([(0, numel, 0) for numel in numels]))
    assert table.rows[:, 5].tolist() == [chunk] * len(numels)
    assert len(table.owners) == sum(-(-numel // chunk) for numel in numels)


def key_of(entries: list[tuple[int, int, int]]) -> tensor_table._Key:
    """Of tensors that this machine has no memory for: addresses, numels, indices in DTYPES."""
    addresses, numels, codes = zip(*entries, strict=True)
    dtypes = tuple(DTYPES[code] for code in codes)
    return tensor_table._Key(torch.device("cpu"), addresses, numels, dtypes, None)


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(0, 10**10), st.integers(0, 3)),
        min_size=1,
        max_size=3,
    )
)
def test_chunks_cover_every_element_once(drawn: list[tuple[int, int, int]]) -> None:
    """Entries of tensors that this machine has no memory for."""
    entries = [
        (at * DTYPES[code].itemsize, numel % 10**8 if i else numel, code)
        for i, (at, numel, code) in enumerate(drawn)
    ]
    rows, owners, launches, others = tensor_table._new(key_of(entries))
    assert not others
    num_chunks = dict.fromkeys(range(4), 0)
    for i, (address, numel, code) in enumerate(entries):
        base, head, end, first, last, chunk = rows[i].tolist()
        assert base % 16 == 0
        assert end - head == numel
        assert base + head * DTYPES[code].itemsize == address
        assert last - first == int((owners == i).sum())
        assert last - first == (-(-end // chunk) if numel else 0)
        assert (owners[first:last] == i).all()
        num_chunks[code] += last - first
        if numel:
            (launch,) = [launch for launch in launches if launch.code == code]
            assert launch.first_chunk <= first
            assert last <= launch.first_chunk + launch.num_chunks
    assert {launch.code: launch.num_chunks for launch in launches} == {
        code: count for code, count in num_chunks.items() if count
    }
