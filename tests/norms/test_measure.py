"""One number for each tensor, as accelerators measure, gives the same norms as all at once."""

from __future__ import annotations

import math

import torch
from torch import nn

import distclip
from distclip.norms.agreement import Header
from distclip.norms.measure import measure
from distclip.norms.reduce import total_norms
from distclip.sharding.local_tensors import local_gradients
from tests.support import reference
from tests.support.layouts import LAYOUTS, UNSHARDED, lay_out, random_wholes
from tests.support.ranks import Ranks, same_bits_everywhere
from tests.support.tolerances import NORM


def one_number_for_each_tensor(device: str) -> None:
    for name, placed in LAYOUTS.items():
        wholes = random_wholes(placed, seed=3)
        params = lay_out(wholes, placed, device)
        for norm_type in (1.0, 2.0, 3.0, 8.0, math.inf):
            plan = distclip.Clipper(params, distclip.ClipNorm(1.0, norm_type)).plan
            (measured,) = measure(local_gradients(params), plan)
            assert len(measured.per_tensor) == len(measured.names) == len(params)
            assert name in UNSHARDED or measured.norm is None, "others add to it"
            norm = total_norms([measured], plan, Header("a call")).norms[0].total
            expected = reference.total_norm(wholes, norm_type)
            torch.testing.assert_close(norm.cpu(), expected, **NORM)
            assert same_bits_everywhere(norm)
        params[0].grad = None
        (measured,) = measure(local_gradients(params), plan)
        assert list(measured.names) == plan.names
        assert measured.per_tensor[0] == 0


def test_one_number_for_each_tensor(four_ranks: Ranks) -> None:
    four_ranks.run(one_number_for_each_tensor, four_ranks.device)


def test_numbers_belong_to_names_wherever_gradients_lie() -> None:
    """Lists of a CPU's backend are in the order of addresses."""
    buffer = torch.ones(30)
    first, second = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    first.grad, second.grad = buffer[20:25], buffer[3:8]
    first.grad[1] = math.nan
    named = [("first", first), ("second", second)]
    report = distclip.Clipper(named, distclip.ClipNorm(1.0, 8.0)).clip_()
    assert report.nonfinite_parameters() == {"first": [0]}
