"""Whole gradients against what is right, without ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distclip.parity import (
    Clip,
    Outcome,
    ParityReport,
    Piece,
    assemble,
    compare,
    whole_gradients,
)
from distclip.sharding import BlockShard, FlatShard, ParamShard
from tests.parity import cases
from tests.support import reference

WHOLE = {
    "a": torch.linspace(-3, 5, 12, dtype=torch.float64).view(3, 4),
    "b": torch.tensor([1e-9, -7.0], dtype=torch.float64),
}
NORM = float(reference.total_norm(list(WHOLE.values())))
LIMIT = NORM / 4


def clipped(factor: float = 0.25) -> dict[str, Tensor]:
    return {name: (grad * factor).float() for name, grad in WHOLE.items()}


def judged(found: dict[str, Tensor], **options: object) -> Outcome:
    given = {"norms": [NORM, NORM]} | options
    return compare(WHOLE, found, LIMIT, **given)


def differing(outcome: Outcome) -> list[str]:
    return [column for column, cell in outcome.cells.items() if not cell.agrees]


def test_what_is_right_agrees() -> None:
    assert differing(judged(clipped())) == []
    before = {name: grad.float() for name, grad in WHOLE.items()}
    outcome = judged(clipped(), before=before, copies={})
    assert differing(outcome) == []
    assert {*outcome.cells} == {"gradients", "norm", "coefficient", "clipped", "copies"}


@pytest.mark.parametrize("error", [1e-4, -1e-4, 1.0, math.nan, math.inf])
def test_one_wrong_element_is_found(error: float) -> None:
    found = clipped()
    found["a"][1, 2] += error
    outcome = judged(found)
    assert "clipped" in differing(outcome)
    [detail] = outcome.cells["clipped"].details
    assert "a: at (1, 2): " in detail


def test_a_tolerance_is_tight_where_gradients_before_are_known() -> None:
    before = {name: grad.float() for name, grad in WHOLE.items()}
    found = clipped(0.25 * (1 + 1e-5))
    assert differing(judged(found)) == []  # as far off as a backward pass may be
    assert differing(judged(found, before=before)) == ["coefficient", "clipped"]


@pytest.mark.parametrize(
    ("norms", "agrees"),
    [
        ([NORM, NORM], True),
        ([NORM * (1 + 1e-7)] * 2, True),
        ([NORM * 1.001] * 2, False),
        ([NORM, math.nextafter(NORM, 0)], False),
        ([-1.0, -1.0], False),
        ([math.nan, math.nan], False),
        ([None, None], True),
        ([None, NORM], True),
    ],
)
def test_norms(norms: list[float | None], agrees: bool) -> None:
    assert ("norm" not in differing(judged(clipped(), norms=norms))) is agrees


def test_a_loss_scale_must_be_gone_after_the_clip() -> None:
    before = {name: (grad * 1024).float() for name, grad in WHOLE.items()}
    assert differing(judged(clipped(), before=before, scale=1024.0)) == []
    scaled = {name: grad * 1024 for name, grad in clipped().items()}
    wrong = judged(scaled, before=before, scale=1024.0, norms=[NORM * 1024] * 2)
    assert differing(wrong) == ["norm", "coefficient", "clipped"]
    assert "1024 times what is right" in str(wrong.cells["clipped"].details)


def test_missing_gradients_are_zero_and_shapes_must_match() -> None:
    zero = WHOLE | {"c": torch.zeros(2, dtype=torch.float64)}
    assert compare(zero, clipped(), LIMIT).agrees
    missing = {"a": clipped()["a"]}
    assert "b: at (1,): 0, not -1.75" in str(judged(missing).cells["clipped"].details)
    extra = clipped() | {"d": torch.ones(3)}
    assert "d: at (0,): 1, not 0" in str(judged(extra).cells["clipped"].details)
    other = clipped() | {"b": torch.zeros(3)}
    assert "b: shape (3,), not (2,)" in str(judged(other).cells["clipped"].details)


def clamp_to_1(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    return {name: grad.clamp(-1, 1) for name, grad in gradients.items()}


def test_other_norms_and_definitions() -> None:
    right = {
        n: g for n, g in zip(WHOLE, reference.clip_norm([*WHOLE.values()], 2.0, 1.0), strict=True)
    }
    one_norm = float(reference.total_norm([*WHOLE.values()], 1.0))
    of_one_norm = Clip(print, norm_type=1.0)
    assert compare(WHOLE, right, 2.0, norms=[one_norm], clip=of_one_norm).agrees
    assert not compare(WHOLE, right, 2.0, norms=[one_norm]).agrees
    clamps = Clip(
        print, expected=lambda grads, limit: {n: g.clamp(-1, 1) for n, g in grads.items()}
    )
    clamped = {name: grad.clamp(-1, 1) for name, grad in WHOLE.items()}
    assert compare(WHOLE, clamped, 2.0, clip=clamps).agrees


def test_bfloat16_has_its_own_tolerance() -> None:
    before = {name: grad.bfloat16() for name, grad in WHOLE.items()}
    found = {name: (grad * 0.25).bfloat16() for name, grad in before.items()}
    assert judged(found, before=before).agrees
    found["a"][0, 0] *= 1.1
    assert not judged(found, before=before).agrees
    wide = {name: grad.float() for name, grad in before.items()}
    coarse = {name: (grad * 0.25).bfloat16().float() for name, grad in before.items()}
    assert not judged(coarse, before=wide).agrees
    assert judged(coarse, before=wide, dtype=torch.bfloat16).agrees


# Pieces -------------------------------------------------------------------------------------------


def block(at: tuple[int, int], sizes: tuple[int, int], fill: float) -> Piece:
    part = ParamShard("w", 16, BlockShard((4, 4), at, sizes))
    return Piece("w", (4, 4), part, torch.full(sizes, fill))


def test_blocks_ranges_and_copies_make_a_whole_tensor() -> None:
    left, right = block((0, 0), (4, 3), 1.0), block((0, 3), (4, 1), 2.0)
    whole, copies = assemble([[left], [right], [left], [right]])
    assert whole["w"].tolist() == [[1.0, 1.0, 1.0, 2.0]] * 4
    assert copies == {}
    other = block((0, 3), (4, 1), 2.0 + 2**-22)
    assert "other bits on ranks [3]" in assemble([[left], [right], [left], [other]]).copies["w"]
    flat = [ParamShard("v", 6, FlatShard((2, 3), start, 0, 3, (3,))) for start in (0, 3)]
    pieces = [[Piece("v", (2, 3), part, torch.arange(3.0))] for part in flat]
    assert assemble(pieces).whole["v"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_sums_in_parts_are_added() -> None:
    parts = [Piece("w", (2,), None, torch.tensor([1.0, r]), (r,)) for r in (0, 1, 1)]
    whole, copies = assemble([[part] for part in parts])
    assert whole["w"].tolist() == [2.0, 1.0]
    assert copies == {}


def test_ranks_without_a_gradient() -> None:
    none = Piece("w", (4, 4), None, None)
    assert assemble([[none], [none]]).whole == {}
    some = assemble([[none], [block((0, 0), (2, 4), 3.0)]])
    assert some.whole["w"].sum() == 24


def test_shapes_that_contradict_each_other() -> None:
    pieces = [[Piece("w", (rows,), None, torch.ones(rows))] for rows in (2, 3)]
    with pytest.raises(ValueError, match=r"'w': it has the shape \(2,\) on rank 0, \(3,\) on rank"):
        assemble(pieces)


def test_the_table() -> None:
    wrong = judged(clipped(0.5), layout="fsdp2", name="ours", step="step 0")
    report = ParityReport(
        (judged(clipped(), layout="fsdp2", name="torch", step="step 0"), wrong), 2
    )
    text = str(report)
    assert "2 ranks against one process in float64" in text
    assert not report.agrees
    assert report.of(clip="torch").agrees
    assert "0.5, not 0.25" in text
    assert "fsdp2, ours, step 0: clipped" in text
    with pytest.raises(KeyError, match="there are"):
        report.of(clip="nothing")


def test_below_the_limit_nothing_may_change() -> None:
    same = {name: grad.float() for name, grad in WHOLE.items()}
    assert compare(WHOLE, same, 2 * NORM).agrees
    doubled = {name: grad * 2 for name, grad in same.items()}
    assert not compare(WHOLE, doubled, 2 * NORM).agrees


def test_gradients_of_zeros_stay_zeros() -> None:
    zeros = {name: torch.zeros_like(grad) for name, grad in WHOLE.items()}
    assert compare(zeros, zeros, 1.0, norms=[0.0, 0.0], before=zeros).agrees
    broken = {name: grad * math.nan for name, grad in zeros.items()}
    assert not compare(zeros, broken, 1.0, before=zeros).agrees


def test_the_reference_of_one_step_needs_no_list() -> None:
    (one,) = whole_gradients(cases.build, cases.step, 2)
    (listed,) = whole_gradients(cases.build, [cases.step], 2)
    assert one.keys() == listed.keys()
    assert all(torch.equal(one[name], listed[name]) for name in one)


def test_the_reference_is_computed_in_float64() -> None:
    (whole,) = whole_gradients(cases.build, cases.step, 2)
    assert all(grad.dtype is torch.float64 for grad in whole.values())
    # Gradients of a float32 run, converted, would be float32 numbers.
    assert all(bool((grad.float().double() != grad).any()) for grad in whole.values())
