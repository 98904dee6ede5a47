"""`distclip.parity` on real ranks: what agrees, what does not, and where."""

from __future__ import annotations

from functools import partial

import pytest

import distclip
from distclip.parity import Clip, ParityReport
from tests.parity import cases

parity = partial(distclip.parity, start_method="forkserver")


@pytest.fixture(scope="module")
def right() -> ParityReport:
    return parity(
        cases.build,
        [cases.step, cases.second_step],
        {
            "ddp": cases.ddp,
            "fsdp2": cases.fsdp2,
            "fsdp1": cases.fsdp1,
            "fsdp1 originals": cases.fsdp1_originals,
        },
    )


def test_every_layout_agrees_for_distclip_and_for_torch(right: ParityReport) -> None:
    assert right.agrees, right
    right.raise_if_different()
    rows = [(each.layout, each.clip, each.step) for each in right.outcomes]
    steps = ["step 0", "step 1", "nothing to clip", "NaN on rank 1"]
    assert rows[:4] == [("ddp", "distclip", step) for step in steps]
    assert len(rows) == 4 * 2 * len(steps)


def test_every_figure_was_compared(right: ParityReport) -> None:
    for outcome in right.outcomes:
        texts = {column: cell.text for column, cell in outcome.cells.items()}
        if outcome.step.startswith("NaN"):
            assert texts == {"ranks": "all see it"}
        else:
            assert [*texts] == ["gradients", "norm", "coefficient", "clipped", "copies"]
            assert "-" not in texts.values()
            assert all(float(texts[c]) < 1e-6 for c in ("norm", "coefficient", "clipped"))
            assert 0 < float(texts["gradients"]) < 1e-5  # float32 against float64


WRONG = {
    # clip: (layout, columns that differ at step 0, columns with nothing to clip)
    "of_local_shards": ("fsdp2", ["norm", "clipped"], ["norm"]),
    "not_clipping": ("fsdp2", ["coefficient", "clipped"], []),
    "one_parameter_less": ("fsdp2", ["coefficient", "clipped"], []),
    "always_scaling": ("fsdp2", [], ["coefficient", "clipped"]),
    "scaled_on_rank_1": ("ddp", ["copies"], ["copies"]),
}


@pytest.fixture(scope="module")
def wrong() -> ParityReport:
    clips = {name: getattr(cases, name) for name in (*WRONG, "blind_on_rank_0")}
    layouts = {"ddp": cases.ddp, "fsdp2": cases.fsdp2, "unsynced": cases.unsynced}
    return parity(cases.build, cases.step, layouts, clips)


@pytest.mark.parametrize("clip", WRONG)
def test_what_a_wrong_clip_does_is_found(wrong: ParityReport, clip: str) -> None:
    layout, *expected = WRONG[clip]
    outcomes = wrong.of(clip=clip, layout=layout).outcomes
    for outcome, columns in zip(outcomes[:2], expected, strict=True):
        differ = [column for column, cell in outcome.cells.items() if not cell.agrees]
        assert set(columns) <= set(differ), wrong
        assert "gradients" not in differ
        assert outcome.agrees is (not columns)
    with pytest.raises(AssertionError, match=f"(?s)differs between ranks.*{clip}"):
        wrong.raise_if_different(clip)


def test_the_parameter_that_differs_is_named(wrong: ParityReport) -> None:
    outcome = wrong.of(clip="one_parameter_less", layout="fsdp2").outcomes[0]
    cell = outcome.cells["clipped"]
    assert cell.text == "1 of 6 differ"
    [detail] = cell.details
    assert detail.startswith("0.weight: at (")
    assert "all of it is 2 times what is right" in detail


def test_a_rank_that_does_not_see_a_nan_is_named(wrong: ParityReport) -> None:
    for layout in ("ddp", "fsdp2"):
        cell = wrong.of(clip="blind_on_rank_0", layout=layout).outcomes[-1].cells["ranks"]
        assert not cell.agrees
        assert cell.text == "1 of 2 do not see it"
        assert "1.0 on rank 0" in cell.details[0]


def test_gradients_that_differ_before_the_clip_are_told_apart(wrong: ParityReport) -> None:
    outcome = wrong.of(clip="not_clipping", layout="unsynced").outcomes[1]
    texts = {column: cell.agrees for column, cell in outcome.cells.items()}
    assert not texts["gradients"]
    assert not texts["copies"]
    assert texts["clipped"]  # it is the layout that differs, and not the clip
    nan = wrong.of(clip="not_clipping", layout="unsynced").outcomes[-1]
    assert nan.cells["ranks"].text == "1 of 2 do not see it"


FAILING = {
    "raising_on_rank_1": ("rank 1 raised RuntimeError: expected a mesh", "rank 0 hangs"),
    "leaving_rank_1_out": ("rank 0 hangs in leaving_rank_1_out (cases.py:", "rank 1 returned"),
    "ending_rank_1": ("rank 1 raised the process ended with exit code 3", "rank 0 hangs"),
    "raising_if_nonfinite": (),
}


@pytest.fixture(scope="module")
def failing() -> ParityReport:
    clips = {name: getattr(cases, name) for name in FAILING}
    return parity(cases.build, cases.step, {"fsdp2": cases.fsdp2}, clips, timeout_s=3)


@pytest.mark.parametrize("clip", [clip for clip, texts in FAILING.items() if texts])
def test_what_ranks_raise_and_where_they_hang_is_a_row(failing: ParityReport, clip: str) -> None:
    outcomes = failing.of(clip=clip).outcomes
    assert [outcome.step for outcome in outcomes] == ["step 0"]
    cell = outcomes[0].cells["ranks"]
    assert not cell.agrees
    assert all(text in cell.details[0] for text in FAILING[clip]), cell


def test_ranks_that_all_raise_on_a_nan_agree(failing: ParityReport) -> None:
    outcomes = failing.of(clip="raising_if_nonfinite").outcomes
    assert all(outcome.agrees for outcome in outcomes)
    assert outcomes[-1].cells["ranks"].text.startswith("every rank raised NonFiniteGradientError")


def test_policies_and_definitions() -> None:
    report = parity(
        cases.build,
        [cases.step, cases.second_step, cases.step],
        {"ddp": cases.ddp, "fsdp2": cases.fsdp2},
        {
            "zclip": distclip.AutoClip(30),
            "agc": distclip.AGC(0.01),
            "value": Clip(cases.clamp, expected=cases.clamped),
            "a clamp for a norm": cases.clamp,
        },
    )
    for clip in ("zclip", "agc", "value"):
        assert report.of(clip=clip).agrees, report
        assert float(report.of(clip=clip).outcomes[2].cells["clipped"].text) < 1e-6
    coefficients = [o.cells["coefficient"] for o in report.of("zclip", "ddp").outcomes[:3]]
    assert all(cell.text != "-" for cell in coefficients)
    assert not report.of(clip="a clamp for a norm").outcomes[0].cells["clipped"].agrees


def test_tensor_parallel_beside_plain_parameters_and_a_layout_that_raises() -> None:
    """The same batch on every rank; torch cannot add norms of DTensors and plain tensors."""
    layouts = {"tp": cases.tensor_parallel, "raises": cases.raises}
    report = parity(cases.build, cases.same_batch, layouts, timeout_s=10)
    assert report.of(clip="distclip", layout="tp").agrees, report
    [outcome] = report.of(clip="torch", layout="tp").outcomes
    assert "every rank raised RuntimeError" in outcome.cells["ranks"].details[0]
    for outcome in report.of(layout="raises").outcomes:  # a row for each clip
        assert outcome.step == "layout"
        assert "every rank raised KeyError: 'no such layout'" in outcome.cells["ranks"].details[0]


def test_gradients_that_the_framework_keeps() -> None:
    report = parity(
        cases.build,
        cases.step,
        {"ddp": cases.ddp, "bf16": cases.in_bfloat16},
        {"distclip": cases.raising_if_nonfinite},
        gradients=cases.moved,
        nonfinite=False,
        max_norm=1.0,
    )
    assert report.agrees, report
    assert len(report.outcomes) == 2  # with a fixed limit, no step that clips nothing
