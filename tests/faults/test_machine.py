"""`Clipper` in every order of calls against the float64 reference: see machine.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.hostile import drawn
from tests.faults.machine import ClipperMachine


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_every_order_of_calls() -> None:
    torch.set_num_threads(1)
    run_state_machine_as_test(ClipperMachine, settings=drawn(200))
    assert ClipperMachine.num_compared > 1000
