from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import Ranks

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

_pools: dict[tuple[int, str], Ranks] = {}


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="no CUDA device on this machine"
                ),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Every test on ranks runs on gloo; and on CUDA tensors, over NCCL if each rank has a GPU of its own."""
    return request.param


@pytest.fixture
def four_ranks(device: str) -> Ranks:
    return pool(4, device)


@pytest.fixture
def four_on_cpus() -> Ranks:
    """For what only a CPU does."""
    return pool(4)


@pytest.fixture
def eight_ranks() -> Ranks:
    """For models in three dimensions. On CPUs alone: gloo cannot send between pipeline stages on one GPU."""
    return pool(8)


def pool(size: int, device: str = "cpu") -> Ranks:
    return _pools.setdefault((size, device), Ranks(size, device))


@pytest.fixture(scope="session", autouse=True)
def _pools_end() -> Iterator[None]:
    yield
    for ranks in _pools.values():
        ranks.stop()
