"""Ranks that load a framework: for its tests alone, because it keeps state in the process.

One pool for all files of a framework: importing it takes seconds on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.ranks import Ranks


def _pool(size: int) -> Any:
    @pytest.fixture(scope="package")
    def pool() -> Iterator[Ranks]:
        ranks = Ranks(size)
        yield ranks
        ranks.stop()

    return pool


two_engine_ranks, four_engine_ranks = _pool(2), _pool(4)  # DeepSpeed, and the Trainer on it
four_titan_ranks = _pool(4)
two_lightning_ranks = _pool(2)
two_accelerated_ranks = _pool(2)
four_megatron_ranks = _pool(4)
