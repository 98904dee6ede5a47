"""The table by which one launch reaches all the tensors of a list."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

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


def test_tables_are_few_and_hold_no_gradient() -> None:
    tensors = [torch.randn(5, device=DEVICE) for _ in range(40)]
    for tensor in tensors:
        tensor_table.table([tensor])
    assert tensor_table._kept.cache_info().currsize <= 32
    dead = weakref.ref(tensors[0])
    del tensors[0]
    gc.collect()
    assert dead() is None


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
        tensor_table._Entry(at * DTYPES[code].itemsize, numel % 10**8 if i else numel, code)
        for i, (at, numel, code) in enumerate(drawn)
    ]
    rows, owners, _ = tensor_table._new(torch.device("cpu"), tuple(entries))
    for i, (address, numel, code) in enumerate(entries):
        base, head, end, coded, first, _ = rows[i].tolist()
        assert base % 16 == 0
        assert coded == code
        assert end - head == numel
        assert base + head * DTYPES[code].itemsize == address
        num_chunks = int((owners == i).sum())
        assert rows[i + 1, 4] - first == num_chunks
        assert num_chunks == -(-end // tensor_table.CHUNK) if numel else num_chunks == 0
        assert (owners[first : first + num_chunks] == i).all()
