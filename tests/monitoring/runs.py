"""Runs that `distclip.History` has written: real reports, of gradients with the norms asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distclip import ClipNorm, Clipper, Policy
from distclip.monitoring import History
from distclip.monitoring.records import Run, read_run
from distclip.report import Report

Norms = Mapping[str, Sequence[float]]


def make_run(
    folder: Path,
    norms: Norms,
    *,
    policy: Policy[Any] | None = None,
    tensor_norms: int = 0,
    every: int = 1,
    nonfinite_parameters: Mapping[int, Mapping[str, Sequence[int]]] | None = None,
    **values: Sequence[float | str],
) -> Run:
    """The run in a folder: one step for each norm of the tensors, which all have as many.

    Args:
        policy: `ClipNorm(1.0)` if None. One with a state is for runs with `tensor_norms` 0 or 1.
        tensor_norms: every n-th step has the norms of the tensors, from the first; 0 for none.
        every: the number of steps from one row to the next.
        nonfinite_parameters: by the number of the row, from 0.
        values: a column each.
    """
    policy = ClipNorm(1.0) if policy is None else policy
    table = torch.tensor(np.array(list(norms.values())).T, dtype=torch.float32)
    totals = table.double().norm(dim=1, keepdim=True).float()
    # Most runs measure their tensors in few steps: one parameter has the same norm, and is faster.
    tensors, model = _Measured(norms, policy, True), _Measured(["model"], policy, False)
    with History(folder) as history:
        for row in range(len(table)):
            has_tensors = tensor_norms > 0 and row % tensor_norms == 0
            report = tensors(table[row]) if has_tensors else model(totals[row])
            history.append(
                report,
                step=1 + row * every,
                nonfinite_parameters=(nonfinite_parameters or {}).get(row),
                **{name: column[row] for name, column in values.items()},
            )
    return read_run(folder)


class _Measured:
    """Clips parameters of one element each; the report of each step."""

    def __init__(self, names: Sequence[str] | Norms, policy: Policy[Any], tensor_norms: bool):
        self.gradients = torch.zeros(len(names))
        params = [(name, nn.Parameter(torch.zeros(1))) for name in names]
        for i, (_, param) in enumerate(params):
            param.grad = self.gradients[i : i + 1]
        self.clipper = Clipper(params, policy, tensor_norms=tensor_norms)

    def __call__(self, norms: torch.Tensor) -> Report:
        self.gradients.copy_(norms)
        return self.clipper.clip_()
