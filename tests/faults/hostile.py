"""What a file or a saved state should never hold, as strategies of hypothesis."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

T = TypeVar("T")
TRUST = os.environ.get("DISTCLIP_TRUST") == "1"


def drawn(examples: int) -> settings:
    """So many examples; 25 times as many, and others each time, with DISTCLIP_TRUST=1."""
    return settings(
        max_examples=examples * 25 if TRUST else examples,
        deadline=None,
        derandomize=not TRUST,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        print_blob=True,
    )


# What Python's `json` cannot write, but other programs can; each stands for itself in a string.
RAW = {
    "\ue000a": "1e999",
    "\ue000b": "-1e999",
    "\ue000c": "1" * 5000,
    "\ue000d": "[" * 5000 + "]" * 5000,
    "\ue000e": '{"a":' * 5000 + "1" + "}" * 5000,
    "\ue000f": "NaN",
    "\ue000g": "-0",
    "\ue000h": "1" * 17 + "e-20",
    "\ue000i": "[" * 400 + "]" * 400,
}
WORDS = ["", "step", "NaN", "-Infinity", "_x", "$\\frac$", "a\nb", "\x1b[2J", "\ud800", "</script>"]
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
INTS = st.one_of(st.integers(-3, 3), st.integers(), st.sampled_from([2**53 + 1, 2**63, 10**40]))
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e308, 5e-324, -1.0, math.nan]))
SCALARS = st.one_of(
    st.none(), st.booleans(), INTS, FLOATS, TEXTS, st.sampled_from(sorted(RAW)), st.just({})
)
JSONS = st.recursive(
    SCALARS,
    lambda each: st.one_of(
        st.lists(each, max_size=3), st.dictionaries(TEXTS, each, max_size=3), st.just([])
    ),
    max_leaves=5,
)


def text_of(value: Any) -> str:
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def _numbers(values: Any) -> Iterator[Any]:
    """Tensors and what is like one, of every dtype that holds such numbers."""
    yield from (values, (values,), [[values]], np.array(values), np.array([values, values]))
    for name in ("float16", "bfloat16", "float32", "int32", "uint8", "uint64", "bool", "complex64"):
        yield torch.tensor(values).nan_to_num(7.0).to(getattr(torch, name))


_RECURSIVE: list[Any] = []
_RECURSIVE.append(_RECURSIVE)
# No tensor may be written by who loads it: each is made anew by `deepcopy`.
STRANGE_TENSORS: list[Any] = [
    *(each for number in (1.0, -1.0, math.nan, math.inf, 0.25, 1e30) for each in _numbers(number)),
    *(torch.tensor(1.0).to(getattr(torch, n)) for n in ("float8_e4m3fn", "float8_e5m2", "uint16")),
    *(torch.tensor(2**63 - 1), torch.tensor(2**53 + 1), torch.tensor(-(2**63))),
    *(torch.ones(()).expand(3), torch.ones(0), torch.ones(2, 2), torch.ones((), device="meta")),
    *(torch.ones(2).to_sparse(), torch.ones((), requires_grad=True)),
    *(np.array("x"), np.array(None), np.datetime64("2020"), np.zeros(3, "M8[s]"), np.float64(2.5)),
    *(b"abc", "1.0", object(), {1, 2}, ..., range(3), int, lambda: 1, _RECURSIVE, 10**400, 1j),
    *({1: 1, "a": 2}, {None: 0}, {(): {}}, {"a": {1: {}}, 2: {}}, [], "x" * 100_000),
]
STATES = st.one_of(st.sampled_from(STRANGE_TENSORS), SCALARS, st.lists(FLOATS, max_size=7))
KEYS = st.one_of(TEXTS, st.sampled_from([0, None, (), 1.5, b"all"]))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in `value` with each of its keys."""
    if not isinstance(value, dict | list):
        return []
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    return [(value, key) for key in keys] + [one for key in keys for one in places(value[key])]


@st.composite
def changed(draw: st.DrawFn, value: Any, by: Any, keys: Any = TEXTS, most: int = 3) -> Any:
    """`value` with some of its parts replaced, removed, renamed, swapped or added."""
    new = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        found = places(new)
        if not found:
            return draw(by)
        container, key = draw(st.sampled_from(found))
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "swap", "add"]))
        if how == "replace":
            container[key] = copy.deepcopy(draw(by))
        elif how == "remove":
            del container[key]
        elif how == "swap":
            other, place = draw(st.sampled_from(found))
            container[key], other[place] = copy.copy(other[place]), copy.copy(container[key])
        elif isinstance(container, dict):
            container[draw(keys)] = container.pop(key) if how == "rename" else draw(by)
    return new


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut, flipped, doubled, with zeros, or something else."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(len(data), at + 64)))
        how = draw(st.sampled_from(["cut", "flip", "zeros", "twice", "without", "insert", "other"]))
        if how == "cut":
            data = data[:at]
        elif how == "flip" and at < len(data):
            flipped = data[at] ^ (1 << draw(st.integers(0, 7)))
            data = data[:at] + bytes([flipped]) + data[at + 1 :]
        elif how == "zeros":
            data = data[:at] + bytes(to - at) + data[to:]
        elif how == "twice":
            data = data[:to] + data[at:]
        elif how == "without":
            data = data[:at] + data[to:]
        elif how == "insert":
            data = data[:at] + draw(st.binary(max_size=16)) + data[at:]
        elif draw(st.integers(0, 9)) == 0:
            data = draw(st.binary(max_size=200))
    return data


def tried(call: Callable[[], T], *kinds: type[Exception]) -> tuple[T | None, Exception | None]:
    """What `call` returns, or the error of these kinds that it raises; others are raised on."""
    try:
        return call(), None
    except kinds as error:
        return None, error
