"""accelerate: the right gradients after `clip_()` and `step()`, however the model was prepared."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from distclip import ClipNorm
from tests.support import accelerated as acc
from tests.support.ranks import Ranks

pytest.importorskip("accelerate")

MAX_NORM = 0.5


def prepare(*args: Any, **kwargs: Any) -> Any:
    from distclip.adapters.accelerate import prepare

    return prepare(*args, **kwargs)


def one_step(layout: str, way: str) -> None:
    expected = acc.whole_gradients(1, acc.num_ranks(layout))
    clipped = acc.norm_clipped(expected, MAX_NORM)
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        if way == "step":
            report = clipper.step()
        else:
            report = clipper.clip_()
            optimizer.step()
        acc.check_report(report, acc.whole_norm(expected))
        assert clipper.report is report
        acc.check_applied(model, before, clipped)
        assert not optimizer.step_was_skipped


def every_layout(way: str) -> None:
    for layout in acc.LAYOUTS:
        one_step(layout, way)


@pytest.mark.parametrize("way", ["clip_", "step"])
def test_every_layout(two_accelerated_ranks: Ranks, way: str) -> None:
    two_accelerated_ranks.run(every_layout, way)


def test_a_missing_accelerate_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name in sys.modules if name.startswith("distclip.adapters.accelerate")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ImportError, match=r"accelerate: it is not installed.*`pip install accelerate=="
    ):
        importlib.import_module("distclip.adapters.accelerate")
