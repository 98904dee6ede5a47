"""A real browser, headless, that opens pages of this machine; what it finds wrong in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# --no-sandbox: Chromium does not start without as root, as in a container.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
IS_DRAWN = "window.Bokeh && Bokeh.documents.length == 1 && Bokeh.documents[0].is_idle"

VIEWS = "Bokeh.index.roots.filter(view => view.frame)"  # in the order of the page
# Each plot: the plain texts of its vertical axis, its range of steps, and how many pixels of its
# frame have each color.
PLOTS = (
    f"() => {VIEWS}"
    + """.map(view => {
  const {x0, x1, y0, y1} = view.frame.bbox, layer = view.canvas_view.primary
  const scale = layer.canvas.width / view.canvas_view.bbox.width
  const inside = [x0 + 2, y0 + 2, x1 - x0 - 4, y1 - y0 - 4].map(each => Math.round(scale * each))
  const copy = new OffscreenCanvas(inside[2], inside[3]), size = inside.slice(2)
  const pixels = copy.getContext("2d", {willReadFrequently: true})  // or Chromium warns
  pixels.drawImage(layer.canvas, ...inside, 0, 0, ...size)
  const {data} = pixels.getImageData(0, 0, ...size)
  const colors = {}
  for (let i = 0; i < data.length; i += 4) {
    const color = data.slice(i, i + 3).join(",")
    colors[color] = (colors[color] ?? 0) + 1
  }
  const {start, end} = view.frame.x_range
  const {axis_label, major_label_overrides} = view.model.left[0]
  const ticks = [...major_label_overrides.values()].map(each => each.text)
  return {label: axis_label?.text, ticks, start, end, colors}
})
"""
)
# Where on the screen a step of a plot is.
PLACE = (
    f"([index, step, y]) => {{ const view = {VIEWS}[index]"
    + """
  const box = view.canvas_view.el.getBoundingClientRect(), {bbox, x_scale} = view.frame
  return [box.x + x_scale.compute(step), box.y + bbox.y0 + y * (bbox.y1 - bbox.y0)]
}
"""
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; a test that needs one is skipped where the machine has none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(NAMES)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = 1200) -> Iterator[Any]:
    """The page when all of its plots are drawn. At the end, nothing went wrong in it."""
    page, problems = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss())
    )
    page.on("request", lambda request: problems.append(f"request: {request.url[:200]}"))
    page.goto(path.as_uri())
    page.wait_for_function(IS_DRAWN, timeout=60_000)
    yield page
    page.close()
    harmless = ("log: [bokeh", f"request: {path.as_uri()}", "request: data:")
    problems = [each for each in problems if not each.startswith(harmless)]
    assert not problems, problems


def plots(page: Any) -> list[dict[str, Any]]:
    return page.evaluate(PLOTS)


def point_at(page: Any, index: int, step: float, height: float = 0.5) -> dict[str, str]:
    """Moves the mouse over a plot, `height` of the way down; what appears."""
    page.evaluate(f"index => {VIEWS}[index].el.scrollIntoView()", index)
    page.mouse.move(*page.evaluate(PLACE, [index, step, height]))
    page.locator(".bk-tooltip-row-value").first.wait_for(timeout=10_000)
    labels, values = (
        page.locator(f".bk-tooltip-row-{part}").all_inner_texts() for part in ("label", "value")
    )
    return {label.strip(" :"): value for label, value in zip(labels, values, strict=True)}
