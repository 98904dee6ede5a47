"""Ranks that load a framework: for its tests alone, because it keeps state in the process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="package")
def two_engine_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="package")
def four_engine_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="package")
def four_titan_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="package")
def two_lightning_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="package")
def two_accelerated_ranks() -> Iterator[Ranks]:
    """For accelerate, which keeps one state a process."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="package")
def four_megatron_ranks() -> Iterator[Ranks]:
    """Importing Megatron takes seconds on each rank: once for its files."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()
