"""Layers whose norm vanishes or explodes over the depth of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distclip.monitoring.findings import Finding, chosen, count, layers_in_words, number
from distclip.monitoring.layers import layer_norms
from distclip.monitoring.records import Floats, Run

# With SGD, a layer whose gradient is a thousandth of another's learns a thousandth as fast. Layers
# of healthy models differ by about 10, embeddings and scales by up to 100.
RANGE = 1e3
# Spearman's: a norm that falls from layer to layer, and not in a layer that is unlike the others.
# Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
# 2010, figure 7, has such a fall.
ORDERED = 0.8
MIN_LAYERS = 4  # the order of fewer is chance
MIN_ROWS = 10  # for a layer out of order: fewer may all be from the first steps
TINY = 1e-4  # of the largest layer's norm
_ADVICE = {
    "vanishing": "Residual connections, normalization, an activation that does not saturate, or a "
    "larger initialization prevent that.",
    "exploding": "Residual connections, normalization, or a smaller initialization prevent that.",
}


def find(run: Run) -> Iterator[Finding]:
    if len(run.tensors.rows) == 0:
        text = (
            "Layers cannot be judged: no step has the norms of its tensors. "
            "`Clipper(..., tensor_norms=10)` measures them in every tenth step."
        )
        yield Finding("no-tensor-norms", False, text)
        return
    layers, norms = layer_norms(run)
    norms = np.nan_to_num(norms[run.finite[run.tensors.rows]])
    if len(norms) == 0:
        return
    never = np.max(norms, axis=0) == 0
    if never.any():
        text = f"No gradient in any step: {layers_in_words(layers, never)}."
        why = "It was frozen, not used, or vanished to 0."
        yield Finding("no-gradient", False, f"{text} {why}", (), chosen(layers, never))
    usual = np.median(norms, axis=0)
    names = chosen(layers, usual > 0)
    if len(names) >= MIN_LAYERS:
        yield from _over_depth(names, usual[usual > 0], len(norms))


def _over_depth(names: Sequence[str], usual: Floats, num_rows: int) -> Iterator[Finding]:
    logs = np.log10(usual)
    slope = _slope(logs)
    if abs(slope) * (len(logs) - 1) >= np.log10(RANGE) and abs(_order(logs)) >= ORDERED:
        kind, than = ("vanishing", "less") if slope > 0 else ("exploding", "more")
        text = (
            f"The gradient is {kind} towards the first layers: its norm is {number(usual[0])} in "
            f"{names[0]} and {number(usual[-1])} in {names[-1]}, {number(10 ** abs(slope))} times "
            f"{than} with each of {count(len(logs), 'layer')}. {_ADVICE[kind]}"
        )
        far = usual <= usual.max() / RANGE if slope > 0 else usual >= usual.min() * RANGE
        yield Finding(kind, True, text, (), chosen(names, far))
    elif num_rows >= MIN_ROWS and (tiny := usual <= TINY * usual.max()).any():
        text = (
            f"The norm of {layers_in_words(names, tiny)} is less than a ten thousandth of "
            f"that of {names[int(usual.argmax())]}: with one learning rate for all, nothing is "
            f"learned there."
        )
        yield Finding("vanishing", True, text, (), chosen(names, tiny))


def _slope(values: Floats) -> float:
    """Theil and Sen's: the median slope of all pairs, which a few unlike layers do not move."""
    i, j = np.triu_indices(len(values), 1)
    return float(np.median((values[j] - values[i]) / (j - i)))


def _order(values: Floats) -> float:
    """Spearman's rank correlation with the depth."""
    return float(np.corrcoef(values.argsort().argsort(), np.arange(len(values)))[0, 1])
