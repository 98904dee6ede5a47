"""Thousands of steps: copies stay the same bits, and nothing grows.

`make test` takes a hundred steps; DISTCLIP_TRUST=1 takes 20,000 of each kind.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch

from tests.faults import long_run
from tests.faults.held import leaks, rises
from tests.faults.hostile import TRUST
from tests.faults.long_run import LISTS, PERIOD, VARIANTS, Sample, differences
from tests.support.ranks import Ranks

NUM_SAMPLES = 100 if TRUST else 6
STEPS_EACH = 200 if TRUST else PERIOD
WARM_UP = 400 if TRUST else 2 * PERIOD  # steps until caches of torch and of the allocator are full
CALL_S = 1800.0 if TRUST else 180.0
pytestmark = pytest.mark.timeout(7200 if TRUST else 400)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_drifts_or_grows(four_on_cpus: Ranks, variant: str) -> None:
    four_on_cpus.run(long_run.begin, variant)
    try:
        four_on_cpus.run(long_run.go_on, variant, WARM_UP, limit_s=CALL_S)
        by_time = [
            four_on_cpus.run(long_run.go_on, variant, STEPS_EACH, limit_s=CALL_S)
            for _ in range(NUM_SAMPLES)
        ]
    finally:
        four_on_cpus.run(long_run.end, variant)
    for ranks in by_time:
        assert differences(ranks) == []
    assert len({ranks[0].weights for ranks in by_time}) == NUM_SAMPLES
    for samples in zip(*by_time, strict=True):
        look_at(variant, samples)


def test_nothing_grows_in_one_process() -> None:
    torch.set_num_threads(1)
    long_run.begin(LISTS)
    try:
        long_run.go_on(LISTS, WARM_UP)
        # As bytes, which are no objects of the collector: it is this process that is looked at.
        kept = [pickle.dumps(long_run.go_on(LISTS, STEPS_EACH)) for _ in range(NUM_SAMPLES)]
        look_at(LISTS, [*map(pickle.loads, kept)])
    finally:
        long_run.end(LISTS)


def look_at(variant: str, samples: Sequence[Sample]) -> None:
    """Those of one rank."""
    steps, counts = [each.step for each in samples], [each.counts for each in samples]
    last = samples[-1]
    print(variant, last, {name: round(rise, 1) for name, rise in rises(steps, counts).items()})
    assert leaks(steps, counts) == []
    assert last.error < 2e-7
    assert last.num_skipped > samples[0].num_skipped
