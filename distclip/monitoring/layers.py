"""The layers of a model, by the names of its tensors, and their norms over a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from distclip.monitoring.records import Floats, Run


def layers_of(names: Iterable[str]) -> dict[str, list[int]]:
    """The indices of the tensors of each layer, with layers in the order of the model.

    A layer is the shortest prefix that ends in a number, such as "model.layers.12" of
    "model.layers.12.mlp.up.weight"; else it is the module of the tensor. Parts that all names begin
    with do not count: a pipeline stage that is "0" has more than one layer.

    Example:
        >>> layers_of(["embed.weight", "layers.0.up.weight", "layers.0.up.bias", "scale"])
        {'embed': [0], 'layers.0': [1, 2], 'scale': [3]}
    """
    paths = [name.split(".") for name in names]
    modules = zip(*(path[:-1] for path in paths), strict=False)
    num_common = len([*takewhile(lambda parts: len({*parts}) == 1, modules)])
    layers: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        layers.setdefault(_layer(path, num_common), []).append(i)
    return layers


def layer_norms(run: Run) -> tuple[tuple[str, ...], Floats]:
    """The names of the layers, and their norms in `run.tensors.rows`, of the row's order p.

    float64 [number of these rows, number of layers]. Where the total norm was finite, a NaN among
    the tensors stands for a tensor that the row lacks: the norm is that of the others, and NaN
    where all of the layer are missing.
    """
    layers, tensors = layers_of(run.tensors.names), run.tensors
    missing = np.isnan(tensors.norms) & run.finite[tensors.rows, None]
    present = np.where(missing, 0.0, tensors.norms)
    norms = np.empty((len(tensors.rows), len(layers)))
    for k, columns in enumerate(layers.values()):
        for p in np.unique(tensors.norm_types):
            of_p = tensors.norm_types == p
            norms[of_p, k] = _together(present[of_p][:, columns], p)
        norms[missing[:, columns].all(axis=1), k] = np.nan
    return tuple(layers), norms


def _together(norms: Floats, p: float) -> Floats:
    """The p-norm of each row; powers of large norms would overflow."""
    if p == 2:
        return np.hypot.reduce(norms, axis=1)
    largest = norms.max(axis=1)
    if np.isinf(p):
        return largest
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    with np.errstate(over="ignore"):  # beside an infinite one
        return scale * ((norms / scale[:, None]) ** p).sum(axis=1) ** (1 / p)


def _layer(path: Sequence[str], num_common: int) -> str:
    ends = (i + 1 for i in range(num_common, len(path) - 1) if path[i].isdecimal())
    return ".".join(path[: next(ends, len(path) - 1)] or path)
