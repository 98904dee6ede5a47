"""The HTML page in a real browser: what it draws, what it says, and that it asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("bokeh", reason="the extra distclip[cli] is not installed")

from distclip import ClipNorm
from distclip.monitoring.page import write_page
from distclip.monitoring.records import Run
from distclip.monitoring.summary import summarize
from tests.monitoring.browser import IS_DRAWN, PLACE, chromium, opened, plots, point_at
from tests.monitoring.runs import make_run

# A folder cannot be named so, but a run in a file of another system can.
EVIL = "<script>alert(1)</script>"
TENSORS = [f"layers.{i}.weight" for i in range(4)] + [f"{EVIL}.weight", "{{7*7}}.x", "$$x^2$$.x"]
LINE, LIMIT, OTHERS = "0,114,178", "230,97,0", "187,187,187"
NOT_FINITE, BAD_CELL, MISSING = "248,217,217", "255,45,45", "221,221,221"
BACKGROUND = {"255,255,255", "229,229,229"}  # with the grid
NUM_STEPS, BAD = 60, range(30, 36)
HUGE = np.geomspace(1e-300, 1e300, 8)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def norms_of_tensors(num_steps: int, names: Sequence[str] = TENSORS) -> dict[str, list[float]]:
    """Of each tensor another one, about 1 in all, with a spike of 50 times in step 11."""
    generator = np.random.default_rng(0)
    table = np.exp(0.2 * generator.standard_normal((len(names), num_steps)))
    table *= np.arange(1, len(names) + 1)[:, None] / (len(names) / 3**0.5) ** 1.5
    table *= np.exp(0.5 * generator.standard_normal(num_steps))
    table[:, 10 % num_steps] *= 50
    return dict(zip(names, table.tolist(), strict=True))


def loss(num_steps: int) -> list[float]:
    return np.geomspace(9.0, 3.0, num_steps).tolist()


def page_of(folder: Path, *runs: Run) -> Path:
    write_page(runs, [summarize(run) for run in runs], folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """One with everything, and a short one."""
    folder = tmp_path_factory.mktemp("runs")
    norms = norms_of_tensors(NUM_STEPS)
    for step in BAD:
        norms["layers.2.weight"][step] = np.nan
    everything = make_run(
        folder / "everything",
        norms,
        tensor_norms=2,
        nonfinite_parameters={step: {"layers.2.weight": [3], EVIL: [0, 1]} for step in BAD},
        loss=loss(NUM_STEPS),
        **{f"{EVIL} $$y$$": [0.25] * NUM_STEPS},
    )
    return [replace(everything, name=EVIL), make_run(folder / "{{7*7}}", norms_of_tensors(20))]


@pytest.fixture(scope="module")
def page(browser: Any, runs: Sequence[Run], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(browser, page_of(tmp_path_factory.mktemp("page"), *runs)) as page:
        yield page


def drawn(plot: dict[str, Any], color: str) -> int:
    """The number of pixels of about that color: the edges of a line are paler."""
    wanted = [*map(int, color.split(","))]
    return sum(
        number
        for each, number in plot["colors"].items()
        if all(abs(int(a) - b) < 12 for a, b in zip(each.split(","), wanted, strict=True))
    )


def is_heat_map(plot: dict[str, Any]) -> bool:
    return bool(plot["ticks"])


def assert_drawn(plot: dict[str, Any]) -> None:
    if is_heat_map(plot):
        assert sum(plot["colors"].values()) > sum(drawn(plot, each) for each in BACKGROUND)
    else:
        assert drawn(plot, LINE) >= 5, plot


def test_every_plot_is_drawn(page: Any) -> None:
    found = plots(page)
    labels = [plot["label"] for plot in found]
    norm, share = ["norm (log scale)"] * 2, ["steps clipped (%)"] * 2
    # The short run has neither a loss nor norms of tensors.
    last = f"…{f'{EVIL} $$y$$'[-23:]}"
    assert labels == ["loss", *norm, *share, *["coefficient"] * 2, None, last]
    assert len(labels) == page.locator("figure").count() - 3 == 9
    for plot in found:
        assert_drawn(plot)
    first, second = found[1:3]
    assert drawn(first, LIMIT) > 20
    assert drawn(second, LIMIT) > 20
    assert drawn(second, LINE) > 20
    assert drawn(second, OTHERS) > 20  # the other run, behind
    assert len(found[7]["colors"].keys() - BACKGROUND) > 30
    assert "measures them" in page.locator("figure").nth(9).inner_text()


def test_what_was_not_finite_is_marked(page: Any) -> None:
    _, first, second, *_, heat_map, _ = plots(page)
    assert drawn(first, NOT_FINITE) > 100
    assert drawn(second, NOT_FINITE) == 0
    assert drawn(heat_map, BAD_CELL) > 100
    hover = point_at(page, 1, 33)
    assert hover["norm not finite"] == "6 of the steps 31 to 36"
    assert hover["because of"] == f"layers.2.weight (rank 3) and {EVIL} (rank 0, 1)"


def test_names_are_text(page: Any, runs: Sequence[Run]) -> None:
    heading = page.locator("h3").all_inner_texts()
    assert heading == [EVIL, "{{7*7}}"]
    assert page.locator("thead th").all_inner_texts()[1:] == heading
    assert page.locator("figcaption b").first.inner_text() == EVIL
    assert page.locator("h2").last.inner_text() == f"{EVIL} $$y$$"
    assert page.locator("script").count() == 3
    ticks = ["layers.0", "layers.1", "layers.2", "layers.3", f"…{EVIL[-23:]}", "{{7*7}}", "$$x^2$$"]
    assert plots(page)[7]["ticks"] == ticks
    layers = [point_at(page, 7, 5, (i + 0.5) / 7)["layer"] for i in (4, 5, 6)]
    assert layers == [EVIL, "{{7*7}}", "$$x^2$$"]
    assert point_at(page, 8, 5)[f"{EVIL} $$y$$"] == "0.25"


def test_hovering_shows_exact_numbers(page: Any, runs: Sequence[Run]) -> None:
    row, run = 6, runs[0]
    hover = point_at(page, 1, int(run.steps[row]))
    assert hover.pop("step") == "7"
    for shown, name in zip(hover, ("total_norm", "limit", "coefficient"), strict=True):
        assert float(hover[shown]) == pytest.approx(run.columns[name][row], rel=1e-6), name
    assert float(point_at(page, 0, 7)["loss"]) == pytest.approx(run.columns["loss"][row], rel=1e-6)
    bar = point_at(page, 3, 8)
    assert bar == {"steps": "6 to 10", "clipped": f"{100 * run.clipped[5:10].mean():.1f} %"}
    cell = point_at(page, 7, 7.5, 1.5 / 7)
    norm = run.tensors.norms[3, run.tensors.names.index("layers.1.weight")]
    assert (cell["layer"], cell["step"]) == ("layers.1", "7")
    assert float(cell["norm"]) == pytest.approx(norm, rel=1e-6)


def test_nothing_leaves_the_page_and_no_other_script_runs(browser: Any, runs: list[Run]) -> None:
    """What the policy in the page is for, should a name ever get into its markup."""
    page = browser.new_page()
    page.goto(page_of(runs[0].path.parent, runs[1]).as_uri())
    refused = """([make]) => new Promise(resolve => {
      document.addEventListener("securitypolicyviolation", e => resolve(e.effectiveDirective))
      setTimeout(() => resolve("allowed"), 2000)
      if (make == "fetch") return fetch("http://127.0.0.1:9/").catch(() => {})
      const element = document.createElement(make)
      if (make == "script") element.textContent = "window.ran = true"
      if (make == "img") element.src = "http://127.0.0.1:9/"
      if (make == "button") element.setAttribute("onclick", "window.ran = true")
      document.body.append(element)
    })"""
    found = {make: page.evaluate(refused, [make]) for make in ("fetch", "img", "script", "button")}
    assert found == {
        **{"fetch": "connect-src", "img": "img-src"},
        **{"script": "script-src-elem", "button": "script-src-attr"},
    }
    assert page.evaluate("window.ran") is None
    page.close()


def test_structure(page: Any, runs: Sequence[Run]) -> None:
    assert page.title() == "Gradient clipping: 2 runs"
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    headings = page.locator("h2").all_inner_texts()
    assert headings[:4] == ["What happened", "Figures", "Plots over the steps", "Loss"]
    findings = page.locator(".findings li").all_inner_texts()
    expected = [finding for run in runs for finding in summarize(run).findings]
    marks = ["Warning: " if finding.is_warning else "" for finding in expected]
    assert findings == [f"{mark}{each.text}" for mark, each in zip(marks, expected, strict=True)]
    assert all(page.locator("figcaption").all_inner_texts())
    handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert [name for name in page.evaluate(handlers) if name.startswith("on")] == []
    labels = page.locator("[aria-labelledby]")
    for i in range(labels.count()):
        name = labels.nth(i).get_attribute("aria-labelledby")
        assert page.locator(f"#{name}").count() == 1, name
    page.set_viewport_size({"width": 600, "height": 900})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") == 600
    page.set_viewport_size({"width": 1200, "height": 900})


def test_all_plots_zoom_together(page: Any) -> None:
    before = plots(page)
    point_at(page, 0, 20)
    page.mouse.down()
    page.mouse.move(*page.evaluate(PLACE, [0, 25, 0.5]), steps=3)
    page.mouse.up()
    page.wait_for_timeout(300)
    after = plots(page)
    assert [round(plot["start"]) for plot in after] == [20] * len(after)
    assert [round(plot["end"]) for plot in after] == [25] * len(after)
    assert all(a["colors"] != b["colors"] for a, b in zip(before[:4], after[:4], strict=True))


def changed(run: Run, **columns: Any) -> Run:
    return replace(run, columns={**run.columns, **columns})


def of_one_step(folder: Path) -> list[Run]:
    return [make_run(folder, {"w": [3.0]}, tensor_norms=1, loss=[2.0])]


def of_nothing_but_nan(folder: Path) -> list[Run]:
    norms = {"a.w": [np.nan] * 20, "b.w": [1.0] * 20}
    return [make_run(folder, norms, tensor_norms=1, loss=[np.nan] * 20)]


def without_limit(folder: Path) -> list[Run]:
    norms = {"a.w": np.geomspace(1e-30, 1e30, 30).tolist(), "zero": [0.0] * 30}
    return [make_run(folder, norms, policy=ClipNorm(np.inf), tensor_norms=1)]


def of_zeros(folder: Path) -> list[Run]:
    return [make_run(folder, {"a.w": [0.0] * 20}, tensor_norms=1, loss=[0.0] * 20)]


def of_names_that_are_the_same(folder: Path) -> list[Run]:
    return [make_run(folder / each / "run", norms_of_tensors(5)) for each in "ab"]


def of_numbers_that_float32_lacks(folder: Path) -> list[Run]:
    run = make_run(folder, {"w": [0.5] * 8})
    return [replace(changed(run, total_norm=HUGE, loss=-HUGE), steps=run.steps * 10**14)]


def of_many_layers(folder: Path) -> list[Run]:
    names = [f"encoder.{'x' * 60}.{i}.weight" for i in range(200)]
    return [make_run(folder, norms_of_tensors(6, names), tensor_norms=1, every=7)]


def with_a_layer_that_came_later(folder: Path) -> list[Run]:
    run = make_run(folder, norms_of_tensors(20), tensor_norms=1)
    run.tensors.norms[:10, 2] = np.nan
    return [run]


CASES = [
    *(of_one_step, of_nothing_but_nan, without_limit, of_zeros, of_names_that_are_the_same),
    *(of_numbers_that_float32_lacks, of_many_layers),
    with_a_layer_that_came_later,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_runs_of_every_kind(browser: Any, tmp_path: Path, case: Any) -> None:
    with opened(browser, page_of(tmp_path, *case(tmp_path / "run"))) as page:
        found = plots(page)
        assert len(found) >= 3
        if case is of_nothing_but_nan:
            assert [each["label"] for each in found] == ["norm (log scale)", "coefficient", None]
            assert [drawn(each, NOT_FINITE) > 1000 for each in found] == [True, True, False]
            assert drawn(found[2], BAD_CELL) > 1000
            return
        for plot in found:
            if plot["label"] != "steps clipped (%)":
                assert_drawn(plot)
        if case is with_a_layer_that_came_later:
            assert page.locator(".keys li").all_inner_texts()[-1] == "missing"
            assert (drawn(found[-1], MISSING) > 1000, drawn(found[-1], BAD_CELL)) == (True, 0)
        if case is of_one_step:
            assert point_at(page, 1, 1) == {
                "step": "1",
                "norm": "3",
                "limit": "1",
                "coefficient": "0.3333333",
            }
        if case is of_names_that_are_the_same:
            assert page.locator("h3").all_inner_texts() == [
                str(tmp_path / "run" / each / "run" / "history.jsonl") for each in "ab"
            ]
        if case is of_numbers_that_float32_lacks:
            hover = point_at(page, 1, 7 * 10**14)
            assert hover["step"] == f"{7 * 10**14}"
            assert float(hover["norm"]) == pytest.approx(HUGE[6], rel=1e-6)


def longer(run: Run, times: int) -> Run:
    """The run so often one after the other."""
    num_rows = len(run.steps)
    rows = np.concatenate([run.tensors.rows + num_rows * i for i in range(times)])
    return replace(
        run,
        steps=np.arange(1, 1 + times * num_rows),
        columns={name: np.tile(column, times) for name, column in run.columns.items()},
        tensors=replace(
            run.tensors,
            rows=rows,
            norms=np.tile(run.tensors.norms, (times, 1)),
            norm_types=np.tile(run.tensors.norm_types, times),
        ),
    )


def test_long_runs_are_small_and_open_soon(browser: Any, tmp_path: Path) -> None:
    """Three of 20,000 steps, with the norms of 384 tensors in 200 of them."""
    names = [f"layers.{i // 8}.{i % 8}" for i in range(384)]
    num = 400
    short = make_run(
        tmp_path / "run", norms_of_tensors(num, names), tensor_norms=100, loss=loss(num)
    )
    run = longer(short, 50)
    run.columns["total_norm"][12_345] = 987.0
    path = page_of(tmp_path, *(replace(run, name=f"run {i}") for i in range(3)))
    assert path.stat().st_size < 5e6
    with opened(browser, path) as page:
        # What the page needs of a processor, however busy the machine is.
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.reload()
        page.wait_for_function(IS_DRAWN, timeout=60_000)
        metrics = session.send("Performance.getMetrics")["metrics"]
        assert {each["name"]: each["value"] for each in metrics}["TaskDuration"] < 3
        for plot in plots(page):
            assert_drawn(plot)
        spike = point_at(page, 3, 12_346)
        assert (spike["step"], spike["norm"]) == ("12346", "987")
