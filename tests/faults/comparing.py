"""How the state machine compares numbers and states with the reference's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.faults.plain import NEW
from tests.faults.plain_steps import Group

F64 = torch.float64
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of limits: see plain.py
FLOAT32_MAX = torch.finfo(torch.float32).max


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def applied(decision: Any) -> Any:
    decision.apply_()
    return decision.report


def smallest(numbers: list[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else min(numbers, default=math.inf)


def same(found: Tensor, wanted: float, single: bool, rtol: float = 2e-6) -> None:
    dtype = torch.float32 if single else F64
    assert found.dtype is dtype
    want = torch.tensor(wanted, dtype=F64).to(dtype)
    torch.testing.assert_close(found, want, rtol=rtol, atol=1e-37, equal_nan=True)


def as_lists(saved: Any) -> Any:
    if isinstance(saved, dict):
        return {key: as_lists(value) for key, value in saved.items()}
    return saved.tolist() if isinstance(saved, Tensor) else saved


def lacks(held: Any, saved: Any) -> bool:
    """Whether a tensor's own number is missing in `saved`."""
    return isinstance(held, dict) and any(k not in saved or lacks(held[k], saved[k]) for k in held)


def same_state(found: Any, wanted: Any, group: Group, rtol: float = 1e-6) -> None:
    if isinstance(wanted, dict):
        for key, value in found.items():
            same_state(value, wanted.get(key, wanted.get(NEW)), group, rtol)
        return
    want = torch.tensor(wanted, dtype=F64)
    torch.testing.assert_close(found.double(), want, rtol=rtol, atol=1e-37)
