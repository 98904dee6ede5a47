"""The self-contained HTML page of some runs."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined

from distclip.monitoring.findings import percent
from distclip.monitoring.page.curves import (
    added_columns,
    clipped_shares,
    coefficients,
    column,
    norms,
)
from distclip.monitoring.page.heat_maps import heat_maps
from distclip.monitoring.page.panels import Section, Shared
from distclip.monitoring.records import Run
from distclip.monitoring.summary import Summary

_MOST_COLUMNS = 4  # of the user's: each is a plot per run


def write_page(runs: Sequence[Run], summaries: Sequence[Summary], path: Path) -> None:
    """Writes one HTML file that needs nothing else, and no network: what the runs did, and plots.

    Args:
        runs: at least one; each has its column of plots.
        summaries: of the same runs.

    Raises:
        OSError: the file cannot be written.
    """
    labels = _labels(runs)
    shared = Shared(dict(zip(labels, runs, strict=True)))
    added = added_columns(runs)
    sections = _sections(shared, added[:_MOST_COLUMNS])
    plots = [panel.plot for section in sections for panel in section.panels if panel.plot]
    document = Document()
    with document.models.freeze():  # else each plot that is added visits all others
        for plot in plots:
            document.add_root(plot)
    script, places = components(plots, wrap_script=False)
    scripts = [*Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw, script]
    html = _template().render(
        title=labels[0] if len(labels) == 1 else f"{len(labels)} runs",
        summaries=dict(zip(labels, summaries, strict=True)),
        figures=list(dict.fromkeys(name for each in summaries for name in each.figures)),
        sections=sections,
        places={plot.id: place for plot, place in zip(plots, places, strict=True)},
        undrawn=added[_MOST_COLUMNS:],
        scripts=scripts,
        hashes=[_hash(each) for each in scripts],
    )
    # A name may have a half of a surrogate pair, which no file can hold.
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")


def _sections(shared: Shared, added: Sequence[str]) -> list[Section]:
    return [
        *(column(shared, name) for name in added if name == "loss"),
        norms(shared),
        clipped_shares(shared),
        coefficients(shared),
        heat_maps(shared),
        *(column(shared, name) for name in added if name != "loss"),
    ]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Their names; where two are the same, their paths."""
    named = Counter(run.name for run in runs)
    labels = [run.name if named[run.name] == 1 else str(run.path) for run in runs]
    if len({*labels}) < len(runs):
        return [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return labels


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("distclip.monitoring", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment.get_template("page.html.jinja")


def _figure(value: float | int | str, name: str) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("share"):
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _hash(script: str) -> str:
    """What the page's policy calls this script by: a browser runs no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
