"""The picture: what its titles say, and that nothing that happened is lost in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from distclip.monitoring.picture import draw, figure_of
from distclip.monitoring.picture.curves import MOST_POINTS, curve
from distclip.monitoring.picture.heat_map import ODD
from distclip.monitoring.records import Run
from tests.monitoring.made_runs import write_history
from tests.monitoring.runs import make_run

NAN = math.nan


def noisy(count: int, level: float = 1.0, seed: int = 0) -> list[float]:
    return (level * np.exp(np.random.default_rng(seed).normal(0, 0.2, count))).tolist()


def layers(count: int, rows: int) -> dict[str, list[float]]:
    return {f"model.layers.{k}.weight": noisy(rows, 0.2, seed=k) for k in range(count)}


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def picture(path: Path, *runs: Run) -> np.ndarray:
    """Colors of its pixels, 0 to 255."""
    draw(runs, path)
    return np.round(imread(path)[..., :3] * 255).astype(int)


def num_pixels(pixels: np.ndarray, color: str) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels == wanted).all(axis=-1).sum())


def test_the_titles_say_what_happened(tmp_path: Path) -> None:
    norms = [4.0] * 10 + [0.5] * 19 + [NAN]
    losses = [*np.linspace(3, 1, 29).tolist(), NAN]
    figure = figure_of([make_run(tmp_path, {"a.w": norms}, loss=losses)], "")
    assert titles(figure) == [
        "The loss was not finite in step 30",
        "The gradient was clipped in 10 of 30 steps; not finite in 1",
        "The strongest clip left 25% of the gradient",
    ]
    assert figure.get_suptitle() == tmp_path.name


def test_the_title_of_the_layers_says_where_the_gradient_vanishes(tmp_path: Path) -> None:
    tensors = {f"layers.{k}.w": noisy(10, 10.0**k, seed=k) for k in range(6)}
    figure = figure_of([make_run(tmp_path, tensors, tensor_norms=1)], "")
    assert titles(figure)[-1] == "The gradient is vanishing towards the first layers"


def test_a_title_of_the_user(tmp_path: Path) -> None:
    assert figure_of([make_run(tmp_path, {"w": [1.0]})], "mine").get_suptitle() == "mine"


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "small", {"w": noisy(30, 0.1)}, loss=[1.0] * 30),
        make_run(tmp_path / "large", {"w": noisy(40, 9.0)}, loss=[2.0] * 40),
        make_run(tmp_path / "layers", layers(3, 20), tensor_norms=1),
    ]
    figure = figure_of(runs, "")
    found = titles(figure)
    assert found[0] == "Loss at the end: 1 (small) to 2 (large)"
    assert "(small)" in found[1]
    assert "(large)" in found[1]
    assert found[2] == "Share of clipped steps: 0% (small) to 100% (large)"
    assert found[4].startswith("layers: The usual norm")
    assert len(found) == 5
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["small", "large", "layers"]
    colors = [line.get_color() for line in legend.get_lines()]
    assert len({*colors}) == 3


@pytest.mark.parametrize(
    "length", [1, 5, MOST_POINTS, 2 * MOST_POINTS, 2 * MOST_POINTS + 1, 20_000]
)
def test_no_spike_and_no_dip_is_lost(length: int) -> None:
    values = np.ones(length)
    values[length // 2] = 50.0
    values[length // 3] = 0.02 if length > 5 else values[length // 3]
    found = curve(np.arange(length), values)
    assert np.nanmax(found.high) == 50.0
    assert np.nanmin(found.low) == values.min()
    assert abs(found.steps[np.nanargmax(found.high)] - length // 2) <= found.num_rows
    assert len(found.steps) <= 2 * MOST_POINTS


def test_a_bucket_without_a_finite_number_is_a_gap() -> None:
    values = np.ones(20_000)
    values[5_000:10_000] = NAN
    values[100] = math.inf
    found = curve(np.arange(20_000), values)
    gap = np.isnan(found.middle)
    np.testing.assert_array_equal(gap, np.isnan(found.high))
    assert found.steps[gap].min() > 4_900
    assert found.steps[gap].max() < 10_100
    assert gap.sum() > MOST_POINTS // 5


def test_many_steps_show_the_clipped_share(tmp_path: Path) -> None:
    norms = [2.0] * 1000 + [0.5] * 3000
    figure = figure_of([make_run(tmp_path, {"w": norms})], "")
    assert titles(figure)[1] == "Clipped in 25% of the steps"


@pytest.mark.parametrize("trouble", [NAN, math.inf, 0.0])
def test_layers_that_are_not_finite_have_a_color_of_their_own(
    tmp_path: Path, trouble: float
) -> None:
    tensors = layers(6, 30)
    color = ODD["0" if trouble == 0 else "not finite"]
    healthy = make_run(tmp_path / "healthy", tensors, tensor_norms=1)
    tensors["model.layers.2.weight"][10:20] = [trouble] * 10
    ill = make_run(tmp_path / "ill", tensors, tensor_norms=1)
    assert num_pixels(picture(tmp_path / "healthy.png", healthy), color) < 200
    assert num_pixels(picture(tmp_path / "ill.png", ill), color) > 3000


@pytest.mark.parametrize("count", [1, 60, 61, 200])
def test_the_labels_of_the_layers_can_be_read(tmp_path: Path, count: int) -> None:
    run = make_run(tmp_path, layers(count, 4), tensor_norms=1)
    figure = figure_of([run], "")
    figure.draw_without_rendering()
    labels = [label for label in figure.axes[-1].get_yticklabels() if label.get_text()]
    assert len(labels) == (count if count <= 60 else -(-count // -(-count // 60)))
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


NAMES = ["$x^2$", "_hidden", "$\\frac$", "名前", "[red]x", "n" * 300, "a\tb", "<b>"]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    tensors = {f"{name}.{k}.w": [1.0, 2.0] for name in NAMES for k in range(2)}
    run = make_run(tmp_path, tensors, tensor_norms=1)
    figure = figure_of([replace(run, name=name) for name in NAMES], "")
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(NAMES)
    assert all(len(text) <= 45 for text in texts)
    draw([replace(run, name=NAMES[0]), replace(run, name=NAMES[3])], tmp_path / "two.png")
    draw([replace(run, name=NAMES[2])], tmp_path / "one.png")


ROWS: dict[str, Sequence[float]] = {
    "one step": [1.0],
    "one step that is not finite": [NAN],
    "nothing finite": [NAN, math.inf, NAN],
    "zeros": [0.0, 0.0, 0.0],
    "very far apart": [1e-30, 1.0, 1e30],
}


@pytest.mark.parametrize("name", ROWS)
def test_odd_runs(tmp_path: Path, name: str) -> None:
    norms = [*ROWS[name]]
    run = make_run(tmp_path, {"a.w": norms, "b.w": norms}, tensor_norms=1, loss=norms)
    assert picture(tmp_path / "one.png", run).shape[1] == 1300
    figure_of([run, replace(run, name="other")], "").draw_without_rendering()


@pytest.mark.parametrize("scale", [1e-300, 8e307])
def test_norms_near_the_ends_of_float64(tmp_path: Path, scale: float) -> None:
    norms = (scale * np.random.default_rng(0).random(30)).tolist()
    tensors = {i: {"a.w": norms[i]} for i in range(30)}
    run = write_history(tmp_path, norms, scale / 10, tensors=tensors)
    figure_of([run], "").draw_without_rendering()
    figure_of([run, replace(run, name="other")], "").draw_without_rendering()


def test_layers_of_no_finite_norm(tmp_path: Path) -> None:
    tensors = {i: {"a.w": NAN, "b.w": math.inf} for i in range(3)}
    figure = figure_of([write_history(tmp_path, [1.0] * 3, tensors=tensors)], "")
    assert "No norm of a layer was finite" in titles(figure)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"w": [1.0, 2.0]})
    path = tmp_path / "report.png"
    path.write_bytes(b"old")
    (tmp_path / ".report.tmp.png").mkdir()
    with pytest.raises(OSError, match="directory"):
        draw([run], path)
    assert path.read_bytes() == b"old"


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    draw([make_run(tmp_path / "run", {"w": [1.0, 2.0]})], tmp_path / "report.png")
    assert {each.name for each in tmp_path.iterdir()} == {"run", "report.png"}
