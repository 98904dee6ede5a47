"""What `benchmarks/passes.py` counts: how often each gradient is read and written."""

from __future__ import annotations

import pytest
import torch

from benchmarks.passes import DTYPES, bytes_per_element, main
from tests.benchmarks.counting import Traffic, tensors_in

# Of unscaling, dividing by the number of tokens, measuring, clipping and stepping.
READS_AND_WRITES = {
    ("AdamW, fused", "torch"): (5, 3),
    ("AdamW, fused", "clip_"): (3, 1),
    ("AdamW, fused", "step"): (2, 1),
    ("SGD with momentum, fused", "torch"): (5, 3),
    ("SGD with momentum, fused", "clip_"): (3, 1),
    ("SGD with momentum, fused", "step"): (2, 1),
    ("AdamW, foreach", "torch"): (6, 3),  # its step reads twice
    ("AdamW, foreach", "clip_"): (4, 1),
    ("AdamW, foreach", "step"): (4, 1),
    ("Muon", "torch"): (6, 3),  # it cannot take a factor
    ("Muon", "clip_"): (4, 1),
    ("Muon", "step"): (4, 1),
    ("two groups: AdamW, fused, both", "torch"): (5, 3),
    ("two groups: AdamW, fused, both", "clip_"): (3, 1),
    ("two groups: AdamW, fused, both", "step"): (2, 1),
    ("two groups: Muon; AdamW, fused", "torch"): (5.5, 3),
    ("two groups: Muon; AdamW, fused", "clip_"): (3.5, 1),
    ("two groups: Muon; AdamW, fused", "step"): (3, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_and_writes(dtype: str) -> None:
    """Large tensors too: those that are measured in chunks."""
    size = DTYPES[dtype].itemsize
    for (optimizer, way), (reads, writes) in READS_AND_WRITES.items():
        counted = bytes_per_element(optimizer, dtype, way, [100_000, 100_000])
        assert counted == [reads * size, writes * size], (optimizer, way)


def test_what_is_counted() -> None:
    x, y = torch.ones(10), torch.ones(10)
    for run, read, written in (
        (lambda: x + y, 40, 0),
        (lambda: x * x, 40, 0),
        (x.view(2, 5)[0].sum, 20, 0),
        (lambda: x.mul_(2), 40, 40),
        (lambda: x.copy_(y), 0, 40),
        (lambda: torch._foreach_mul_([x, y], 2.0), 40, 40),
        (y.sum, 0, 0),
    ):
        with Traffic([x]) as traffic:
            run()
        assert (traffic.read, traffic.written) == (read, written)
    assert len(list(tensors_in([x, None, 3]))) == 1


def test_fused_kernels_write_gradients_back_only_when_they_divide() -> None:
    """What the count assumes of torch."""
    for scale in (None, torch.tensor(2.0)):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        optimizer = torch.optim.AdamW([param], fused=True)
        version = param.grad.clone()
        optimizer.grad_scale = scale
        optimizer.step()
        assert torch.equal(param.grad, version) == (scale is None)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--elements", "2048", "--rounds", "3"])
    out = capsys.readouterr().out
    assert "20 + 12" in out
    assert "8 + 4" in out
