"""What distclip keeps alive: nothing that its user has let go."""

from __future__ import annotations

import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

from distclip import AGC, ClipNorm, Clipper, Policy, Report
from tests.support.ranks import Ranks, mesh


def with_gradients(value: float = 1.0) -> nn.Linear:
    model = nn.Linear(3, 2)
    for param in model.parameters():
        param.grad = torch.full_like(param, value)
    return model


@pytest.mark.parametrize("policy", [ClipNorm(0.1), AGC(0.1)], ids=str)
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_report_keeps_nothing_alive(policy: Policy, value: float) -> None:
    model = with_gradients(value)
    clipper = Clipper(model, policy)
    report = clipper.clip_()
    gone = [
        weakref.ref(each)
        for each in (model, clipper, clipper.plan, model.weight, model.weight.grad)
    ]
    gc.collect()
    gc.disable()
    try:
        del model, clipper
        assert [ref() for ref in gone] == [None] * 5
    finally:
        gc.enable()
    assert bool(report.finite) == math.isfinite(value)
    assert sorted(report.nonfinite_parameters()) == ([] if report.finite else ["bias", "weight"])


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_report_of_one_process_pickles_whole(value: float) -> None:
    report = Clipper(with_gradients(value)).clip_()
    copy = pickle.loads(pickle.dumps(report))
    assert isinstance(copy, Report)
    assert str(copy.to_dict()) == str(report.to_dict())
    assert copy.nonfinite_parameters() == report.nonfinite_parameters()


def reports_of_ranks() -> None:
    model = nn.Linear(2, 2)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh((4,), ("dp",)))
    for step, value in enumerate((1.0, math.nan)):
        for param in model.parameters():
            param.grad = torch.full_like(param, value)
        report = Clipper(model, ClipNorm(0.1)).clip_()
        copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(report))))
        assert str(copy.to_dict()) == str(report.to_dict())
        if step == 0:
            assert copy.nonfinite_parameters() == {}
        else:
            assert set(report.nonfinite_parameters()) == {"weight", "bias"}
            with pytest.raises(RuntimeError, match="this report was pickled"):
                copy.nonfinite_parameters()


def test_a_report_of_several_ranks_pickles_without_the_others(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(reports_of_ranks)


def test_optimizers_that_are_gone_are_gone() -> None:
    model = with_gradients()
    clipper = Clipper(model)
    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    gone = []
    for _ in range(3):
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper.clip_(optimizer, scaler)
        clipper.clip_(optimizer, scale=0.5)
        scaler.step(optimizer)
        scaler.update()
        gone.append(weakref.ref(optimizer))
        del optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    clipper.clip_(last := SGD(model.parameters(), lr=0.1), scaler)
    assert [[ref() for ref in each.optimizers] for each in clipper._held._checked._seen] == [[last]]


def test_another_optimizer_of_other_parameters_is_checked() -> None:
    """Also where it has the address of one that is gone."""
    model, other = with_gradients(), with_gradients()
    clipper = Clipper(model)
    for _ in range(5):
        clipper.clip_(SGD(model.parameters(), lr=0.1), scale=0.5)
        with pytest.raises(ValueError, match="no optimizer given steps 'weight'"):
            clipper.clip_(SGD(other.parameters(), lr=0.1), scale=0.5)
