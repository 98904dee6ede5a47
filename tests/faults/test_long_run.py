"""Thousands of steps: copies stay the same bits, and nothing grows.

`make test` takes some hundred steps; DISTCLIP_TRUST=1 takes 20,000 of each kind.
"""

from __future__ import annotations

import pytest

from tests.faults import long_run
from tests.faults.held import leaks, rises
from tests.faults.hostile import TRUST
from tests.faults.long_run import PERIOD, VARIANTS, differences
from tests.support.ranks import Ranks

NUM_SAMPLES = 100 if TRUST else 6
STEPS_EACH = 200 if TRUST else PERIOD
WARM_UP = 400 if TRUST else 40  # steps until caches of torch and of the allocator are full


@pytest.mark.timeout(7200 if TRUST else 400)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_drifts_or_grows(four_on_cpus: Ranks, variant: str) -> None:
    four_on_cpus.run(long_run.begin, variant)
    try:
        four_on_cpus.run(long_run.go_on, variant, WARM_UP)
        by_time = [
            four_on_cpus.run(long_run.go_on, variant, STEPS_EACH) for _ in range(NUM_SAMPLES)
        ]
    finally:
        four_on_cpus.run(long_run.end, variant)
    for ranks in by_time:
        assert differences(ranks) == []
    assert len({ranks[0].weights for ranks in by_time}) == NUM_SAMPLES
    steps = [ranks[0].step for ranks in by_time]
    for samples in zip(*by_time, strict=True):
        counts, last = [each.counts for each in samples], samples[-1]
        print(variant, last, {n: round(rise, 1) for n, rise in rises(steps, counts).items()})
        assert leaks(steps, counts) == []
        assert last.error < 2e-7
        assert last.num_skipped > samples[0].num_skipped
