"""What a summary finds in runs whose trouble is known, and that it finds none in healthy ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distclip import ClipNorm, ClipTensorNorm
from distclip.monitoring import History
from distclip.monitoring.findings import number, percent, steps_in_words
from distclip.monitoring.findings.spikes import spikes_of
from distclip.monitoring.records import Run, read_run
from distclip.monitoring.summary import Finding, summarize
from tests.monitoring.runs import make_run
from tests.monitoring.trained import classify, healthy, stack, train

RELU = math.sqrt(2)  # the gain that keeps norms as they are


def found(run: Run, kind: str, warning: bool = True) -> Finding:
    """The one finding of that kind."""
    findings = summarize(run).findings
    of_kind = [each for each in findings if each.kind == kind and each.is_warning == warning]
    assert len(of_kind) == 1, findings
    return of_kind[0]


def warnings_of(run: Run) -> list[str]:
    return [each.kind for each in summarize(run).findings if each.is_warning]


def noisy(count: int, level: float = 1.0, seed: int = 0) -> list[float]:
    return (level * np.exp(np.random.default_rng(seed).normal(0, 0.2, count))).tolist()


# Trained models with known causes.


@pytest.mark.parametrize("depth", [8, 25])
def test_a_stack_of_sigmoids_vanishes(tmp_path: Path, depth: int) -> None:
    model = stack(nn.Sigmoid, depth)
    run = train(tmp_path, model, classify(model), 120, tensor_norms=10)
    finding = found(run, "vanishing")
    assert "towards the first layers" in finding.text
    assert f"each of {depth + 1} layers" in finding.text
    assert finding.tensors[0] == "0"
    assert str(2 * depth) not in finding.tensors
    assert depth > 8 or "did not change" in found(run, "loss").text


def test_saturated_tanh_explodes_towards_the_first_layers(tmp_path: Path) -> None:
    model = stack(nn.Tanh, 20, gain=4.0)
    run = train(tmp_path, model, classify(model), 40, tensor_norms=10)
    finding = found(run, "exploding")
    assert "towards the first layers" in finding.text
    assert finding.tensors[0] == "0"
    assert "vanishing" not in warnings_of(run)


def test_relus_of_a_large_gain_explode_from_the_start(tmp_path: Path) -> None:
    model = stack(nn.ReLU, 10, gain=5.0)
    run = train(tmp_path, model, classify(model), 40)
    assert "from the start" in found(run, "exploding").text
    assert "times the limit" in found(run, "limit").text


def test_a_learning_rate_that_is_too_large_explodes(tmp_path: Path) -> None:
    model = stack(nn.ReLU, 3, gain=RELU)
    generator = torch.Generator().manual_seed(0)

    def loss(_: int) -> Tensor:
        x = torch.randn(16, 24, generator=generator)
        return functional.mse_loss(model(x), x[:, :4])

    run = train(tmp_path, model, loss, 60, lr=3.0, limit=1e9)
    finding = found(run, "exploding")
    assert finding.steps[0] <= 3
    assert found(run, "nonfinite").steps[0] > finding.steps[0]


def test_one_layer_leads_a_spike(tmp_path: Path) -> None:
    model = stack(nn.ReLU, 5, gain=RELU)

    def hook(step: int, model: nn.Module) -> None:
        if step in (70, 71):
            model.get_parameter("4.weight").grad.mul_(100)

    run = train(tmp_path, model, classify(model), 120, hook=hook)
    finding = found(run, "spikes")
    assert len(finding.steps) == 1
    assert finding.steps[0] in (70, 71)
    assert finding.tensors == ["4"]
    assert "led by layer 4" in finding.text
    assert warnings_of(run) == ["spikes"]


def test_a_corrupted_batch_is_a_spike_of_all_layers(tmp_path: Path) -> None:
    model = stack(nn.ReLU, 4, gain=RELU)
    clean = classify(model)

    def loss(step: int) -> Tensor:
        if step != 80:
            return clean(step)
        return functional.cross_entropy(model(1000 * torch.randn(32, 24)), torch.arange(32) % 4)

    finding = found(train(tmp_path, model, loss, 120), "spikes")
    assert finding.steps == [80]
    assert len(finding.tensors) >= 4


@pytest.mark.parametrize("find_nonfinite", [True, False])
def test_who_caused_a_nan(tmp_path: Path, find_nonfinite: bool) -> None:
    model = stack(nn.ReLU, 4, gain=RELU)

    def hook(step: int, model: nn.Module) -> None:
        if step == 30:
            model.get_parameter("4.weight").grad[1, 2] = math.nan

    loss = classify(model)
    run = train(tmp_path, model, loss, 50, find_nonfinite=find_nonfinite, hook=hook)
    finding = found(run, "nonfinite")
    assert finding.steps == list(range(30, 51))
    assert finding.tensors == ["4.weight"]
    assert "In step 30 it came from 4.weight" in finding.text
    assert ("rank 0" in finding.text) == find_nonfinite
    assert "to the end of the run" in finding.text
    not_finite = next(each for each in summarize(run).findings if each.kind == "loss")
    assert not_finite.text == "The loss was not finite in steps 31 to 50."


def test_units_that_die(tmp_path: Path) -> None:
    model = stack(nn.ReLU, 4, gain=RELU)

    @torch.no_grad()
    def hook(step: int, model: nn.Module) -> None:
        if step == 60:
            model.get_parameter("2.bias").fill_(-1e3)

    run = train(tmp_path, model, classify(model), 120, hook=hook)
    finding = found(run, "vanishing")
    assert finding.steps == [61]
    assert {"0", "2"} <= {*finding.tensors}
    assert "No gradient any more from step 61" in finding.text


@pytest.mark.parametrize("kind", ["mlp", "lstm", "transformer"])
@pytest.mark.parametrize("seed", range(3))
def test_healthy_training_has_no_warning(tmp_path: Path, kind: str, seed: int) -> None:
    assert warnings_of(healthy(tmp_path, kind, seed)) == []


# Rows with known figures.


def test_how_often_it_clipped_and_where(tmp_path: Path) -> None:
    norms = [4.0] * 10 + [2.0] * 10 + [0.5] * 20
    finding = found(make_run(tmp_path, {"w": norms}), "clipping", warning=False)
    assert "Clipped in 20 of 40 steps (50%)" in finding.text
    assert "100%, 100%, 0%, 0%" in finding.text
    assert "median coefficient is 0.375, the smallest 0.25" in finding.text


def test_clipping_that_changed_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": noisy(30, 0.1)})
    assert "changed no gradient" in found(run, "clipping", warning=False).text


def test_a_policy_that_only_measures(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": noisy(30)}, policy=ClipNorm(math.inf))
    assert "only measured" in found(run, "clipping", warning=False).text


def test_steps_that_are_not_finite_are_no_clipped_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [2.0, math.nan, 2.0, 0.5]})
    assert "2 of 3 finite steps" in found(run, "clipping", warning=False).text
    assert summarize(run).figures["clipped_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("norm", "kind"), [(5.0, "limit"), (500.0, "limit")])
def test_nearly_every_step_clipped(tmp_path: Path, norm: float, kind: str) -> None:
    assert found(make_run(tmp_path, {"w": noisy(40, norm)}), kind, warning=norm > 100)


def spike_run(folder: Path, rows: Sequence[int], factor: float = 20.0, count: int = 200) -> Run:
    norms = noisy(count)
    for row in rows:
        norms[row] *= factor
    return make_run(folder, {"w": norms})


SPIKES = {
    "apart": ([50, 120], [51, 121]),
    "near": ([50, 51, 54, 60], None),
    "second-last": ([198], [199]),
    "last": ([199], [200]),
    "in the first steps": ([3], []),
    "none": ([], []),
}


@pytest.mark.parametrize("name", SPIKES)
def test_spikes(tmp_path: Path, name: str) -> None:
    rows, steps = SPIKES[name]
    run = spike_run(tmp_path, rows)
    spikes = spikes_of(run)
    if steps is None:
        assert [(each.first, each.last) for each in spikes] == [(50, 60)]
    else:
        assert [int(run.steps[each.row]) for each in spikes] == steps
    assert ("spikes" in warnings_of(run)) == bool(spikes)


NO_SPIKES: dict[str, list[float]] = {
    "twice the usual": [*noisy(80), 2.0, *noisy(80)],
    "a level that stays": [*noisy(100), *noisy(100, 20.0)],
    "the fall at the start": (
        np.array(noisy(200)) * (1 + 50 * np.exp(-np.arange(200) / 8))
    ).tolist(),
    "norms that vary a lot": np.exp(np.random.default_rng(0).normal(0, 1.2, 300)).tolist(),
}


@pytest.mark.parametrize("name", NO_SPIKES)
def test_no_spikes(tmp_path: Path, name: str) -> None:
    assert spikes_of(make_run(tmp_path, {"w": NO_SPIKES[name]})) == []


def test_constant_norms_have_no_deviation_and_still_spikes(tmp_path: Path) -> None:
    assert len(spikes_of(make_run(tmp_path, {"w": [1.0] * 50 + [10.0] + [1.0] * 50}))) == 1


def test_a_layer_of_no_weight_leads_no_spike(tmp_path: Path) -> None:
    large, small = noisy(100), [1e-9] * 100
    large[60], small[60] = 30.0, 1e-3
    run = make_run(tmp_path, {"a.w": large, "b.w": small}, tensor_norms=1)
    assert found(run, "spikes").tensors == ["a"]


def test_a_spike_without_tensor_norms(tmp_path: Path) -> None:
    norms = noisy(100)
    norms[61] = 30.0
    run = make_run(tmp_path, {"a.w": norms}, tensor_norms=10)
    assert "no tensor norms" in found(run, "spikes").text


def test_norms_that_grow_over_the_run(tmp_path: Path) -> None:
    norms = (np.array(noisy(300)) * np.logspace(0, 3, 300)).tolist()
    assert "explodes" in found(make_run(tmp_path, {"w": norms}), "exploding").text


def test_a_layer_that_fades(tmp_path: Path) -> None:
    fading = (np.array(noisy(100)) * np.where(np.arange(100) < 60, 1, 1e-6)).tolist()
    tensors = {"a.w": noisy(100), "b.w": fading}
    finding = found(make_run(tmp_path, tensors, tensor_norms=1), "vanishing")
    assert finding.tensors == ["b"]


def test_learning_that_ends_is_no_fading(tmp_path: Path) -> None:
    end = np.logspace(0, -12, 100)
    tensors = {name: (np.array(noisy(100)) * end).tolist() for name in ("a.w", "b.w")}
    assert warnings_of(make_run(tmp_path, tensors, tensor_norms=1)) == []


def test_a_layer_without_gradient_is_named(tmp_path: Path) -> None:
    tensors = {"a.w": noisy(40), "b.w": [0.0] * 40}
    finding = found(make_run(tmp_path, tensors, tensor_norms=1), "no-gradient", warning=False)
    assert finding.tensors == ["b"]


def test_an_unlike_layer_is_no_trend(tmp_path: Path) -> None:
    tensors = {f"l.{k}.w": noisy(30, 1e-5 if k == 2 else 1.0, k) for k in range(8)}
    finding = found(make_run(tmp_path, tensors, tensor_norms=1), "vanishing")
    assert finding.tensors == ["l.2"]
    assert "towards" not in finding.text


def test_norms_that_go_up_and_down_are_no_trend(tmp_path: Path) -> None:
    levels = [10 ** (0.25 * k + 1.4 * (-1) ** k) for k in range(16)]
    tensors = {f"l.{k}.w": noisy(30, level / 1e4, k) for k, level in enumerate(levels)}
    findings = summarize(make_run(tmp_path, tensors, tensor_norms=1)).findings
    assert not any("towards" in each.text for each in findings)


def test_a_nan_without_a_cause_says_what_to_add(tmp_path: Path) -> None:
    finding = found(make_run(tmp_path, {"w": [1.0, math.nan, 1.0]}), "nonfinite")
    assert "nonfinite_parameters=report.nonfinite_parameters()" in finding.text
    assert finding.steps == [2]


def test_ranks_of_a_nan(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, {"w": [1.0, math.inf, 1.0]}, nonfinite_parameters={1: {"l.3.w": [2, 5]}}
    )
    assert "it came from l.3.w on ranks 2 and 5" in found(run, "nonfinite").text


def test_a_nan_of_no_known_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [1.0, math.inf, 1.0]}, nonfinite_parameters={1: {"l.3.w": []}})
    assert "it came from l.3.w on rank unknown." in found(run, "nonfinite").text


def test_a_limit_of_0_is_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [1.0] * 30}, policy=ClipNorm(0.0))
    assert "The usual norm has a limit of 0." in found(run, "limit").text


LOSSES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, bool]] = {
    "fell": (lambda t: 3 * np.exp(-t), "The loss fell:", False),
    "rose": (lambda t: 1 + t, "The loss rose:", True),
    "stayed": (lambda t: 2 + 0 * t, "did not change", True),
    "rose again": (lambda t: 3 - 8 * t * (1 - t), "and rose again", True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss(tmp_path: Path, name: str) -> None:
    function, text, warning = LOSSES[name]
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
    losses = (function(np.linspace(0, 1, 200)) + noise).tolist()
    finding = found(make_run(tmp_path, {"w": noisy(200)}, loss=losses), "loss", warning)
    assert text in finding.text


def test_a_loss_of_some_rows_and_another_name(tmp_path: Path) -> None:
    clipped = make_run(tmp_path / "other", {"w": noisy(30)}).columns
    assert "loss" not in clipped
    falling = np.linspace(3, 1, 300).tolist()
    values = [loss if i % 10 == 0 else "-" for i, loss in enumerate(falling)]
    run = make_run(tmp_path, {"w": noisy(300)}, train_loss=values)
    assert warnings_of(run) == []
    assert summarize(run).figures["last_loss"] == pytest.approx(np.mean(falling[200::10]))


def test_no_loss_says_so(tmp_path: Path) -> None:
    assert (
        "loss=loss.detach()" in found(make_run(tmp_path, {"w": noisy(30)}), "no-loss", False).text
    )


def test_two_steps_say_that_they_say_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [100.0, 1.0]}, loss=[1.0, 5.0])
    assert "2 steps are too few" in found(run, "short", warning=False).text
    assert warnings_of(run) == []


def test_one_step_that_is_not_finite(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [math.nan]}, tensor_norms=1, loss=[math.nan])
    assert set(warnings_of(run)) == {"nonfinite", "loss"}


def append(folder: Path, steps: Sequence[int], after: int | None = None) -> None:
    weight = torch.zeros(1, requires_grad=True)
    from distclip import Clipper

    clipper = Clipper([weight], ClipNorm(1.0))
    with History(folder, after=after) as history:
        for step in steps:
            weight.grad = torch.ones(1)
            history.append(clipper.clip_(), step=step)


def test_steps_and_lines_that_are_missing(tmp_path: Path) -> None:
    append(tmp_path, [*range(1, 11), *range(14, 31)])
    append(tmp_path, range(26, 41), after=25)
    path = tmp_path / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 5, ', b'{"step": 5 ', 1) + b'{"step": 4')
    texts = [each.text for each in summarize(read_run(tmp_path)).findings if each.kind == "file"]
    assert any("11 to 13" in text for text in texts)
    assert any("2 lines of the file were broken" in text for text in texts)
    assert any("5 steps" in text and "again" in text for text in texts)


def test_every_tenth_step_is_no_gap(tmp_path: Path) -> None:
    assert warnings_of(make_run(tmp_path, {"w": noisy(40)}, every=10)) == []


def test_groups(tmp_path: Path) -> None:
    from distclip import Clipper

    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [
        {"params": [weights[0]], "policy": ClipNorm(1.0), "name": "dense"},
        {"params": [weights[1]], "policy": ClipTensorNorm(10.0), "name": "experts"},
    ]
    clipper = Clipper(groups)
    with History(tmp_path) as history:
        for _ in range(20):
            for weight in weights:
                weight.grad = torch.full((1,), 5.0)
            history.append(clipper.clip_())
    finding = found(read_run(tmp_path), "groups", warning=False)
    assert "dense 100%, experts 0%" in finding.text


def test_a_summary_is_json(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [1.0, math.nan]}, tensor_norms=1, loss=[math.inf, math.nan])
    summary = json.loads(json.dumps(summarize(run).to_dict(), allow_nan=False))
    assert summary["figures"]["last_loss"] == "NaN"
    assert summary["figures"]["nonfinite_steps"] == 1
    assert {"kind", "is_warning", "text", "steps", "tensors"} == summary["findings"][0].keys()


def test_warnings_come_first(tmp_path: Path) -> None:
    flags = [each.is_warning for each in summarize(spike_run(tmp_path, [100])).findings]
    assert flags == sorted(flags, reverse=True)
    assert flags[0]


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([3], "step 3"),
        ([3, 4], "steps 3 and 4"),
        ([3, 4, 5, 9], "steps 3 to 5 and 9"),
        ([1, 3, 5], "steps 1, 3 and 5"),
        ([1, 3, 5, 7, 9], "5 steps from 1 to 9"),
    ],
)
def test_steps_in_words(steps: list[int], text: str) -> None:
    assert steps_in_words(steps) == text


def test_numbers_in_words() -> None:
    assert [percent(share) for share in (0, 1e-4, 0.5, 0.9996, 1)] == [
        *("0%", "0.01%", "50%", "99.96%", "100%")
    ]
    assert [number(value) for value in (0.01234, 5.678, 4567.8, 1e7)] == [
        *("0.0123", "5.68", "4,570", "1e+07")
    ]
