"""torch's multi-tensor functions, the fallback on devices without Triton, against `naive`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distclip.kernels import foreach, naive

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64)


def gradients() -> list[Tensor]:
    whole = [torch.randn(n).to(dtype) for n in (0, 1, 7, 40_000) for dtype in DTYPES]
    return [*whole, torch.randn(30, 40).t(), torch.randn(30, 40)[:, ::3], torch.randn(())]


@pytest.mark.parametrize("complex_too", [False, True])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_sums(norm_type: float, complex_too: bool) -> None:
    tensors = [t for t in gradients() if complex_too or not t.is_complex()]
    found = foreach.power_sums(tensors, norm_type)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive.power_sums(tensors, norm_type), rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e30, 3e38, math.inf, math.nan])
def test_sums_of_any_magnitude(value: float, norm_type: float) -> None:
    tensors = [
        torch.full((2000,), value),
        torch.tensor([math.inf, value, 1.0]),
        torch.full((9,), value).bfloat16(),
    ]
    expected = naive.power_sums(tensors, norm_type)
    torch.testing.assert_close(
        foreach.power_sums(tensors, norm_type), expected, rtol=1e-12, atol=0, equal_nan=True
    )


def test_no_tensors() -> None:
    assert foreach.power_sums([], 2.0).shape == (0,)
    assert foreach.power_sums([torch.zeros(0)], math.inf).tolist() == [0]
    foreach.scale_([], torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("coefficient", [0.3, 1e-9, 1.0, 0.0, math.nan])
def test_scaled_as_by_naive(coefficient: float) -> None:
    """The same bits: a coefficient rounded to 16 bits first would show."""
    tensors = gradients()
    expected = [t.clone() for t in tensors]
    factor = torch.tensor(coefficient, dtype=torch.float64)
    foreach.scale_(tensors, factor)
    naive.scale_(expected, factor)
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0, equal_nan=True)
