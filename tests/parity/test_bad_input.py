"""What cannot be compared is said in one sentence, before ranks start where that is possible."""

from __future__ import annotations

import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip.parity import gradient_pieces
from distclip.parity.clips import as_number
from distclip.parity.worker import InvalidTask, Task, Worker
from tests.parity import cases

LAYOUTS = {"ddp": cases.ddp}


def build_by_rank() -> nn.Module:
    model = cases.build()
    if torch.distributed.is_initialized():
        nn.init.zeros_(model[0].weight)
    return model


def no_model() -> list[nn.Module]:
    return [cases.build()]


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"build": lambda: None}, ValueError, "cannot send build to the ranks"),
        ({"build": 3}, TypeError, "cannot use build=3: it is an int and cannot be called"),
        ({"build": no_model}, TypeError, "build() returned a list"),
        ({"step": lambda *_: None}, ValueError, "cannot send step to the ranks"),
        ({"step": []}, ValueError, "`step` is empty"),
        ({"step": cases.no_gradients}, ValueError, "it left no gradients in the whole model"),
        ({"layouts": {}}, TypeError, "Pass a dict with at least one function"),
        ({"layouts": cases.ddp}, TypeError, "cannot use layouts="),
        ({"layouts": {"a": None}}, TypeError, "cannot use layouts['a']=None"),
        ({"layouts": {"a": partial(print, lambda: 0)}}, ValueError, "cannot send layouts['a']"),
        ({"clips": {"a": lambda m, n: 0}}, ValueError, "cannot send clips['a'] to the ranks"),
        ({"clips": {"a": distclip.ClipNorm}}, TypeError, "clips['a']"),
        ({"clips": {}}, TypeError, "cannot use clips={}"),
        ({"gradients": 1}, TypeError, "cannot use gradients=1"),
        ({"whole_step": [cases.step] * 2}, ValueError, "1 steps with 2 of the whole model"),
        ({"world_size": 0}, ValueError, "world_size=0"),
        ({"world_size": True}, ValueError, "world_size=True"),
        ({"world_size": "2"}, ValueError, "world_size='2': it is a str"),
        ({"nonfinite": "False"}, TypeError, "nonfinite='False'"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"max_norm": 0}, ValueError, "max_norm=0.0: it must be above 0"),
        ({"max_norm": "1.0"}, TypeError, "max_norm='1.0'"),
        ({"max_norm": 1e9}, ValueError, "nothing would be clipped"),
        ({"scale": float("inf")}, ValueError, "scale=inf"),
        ({"timeout_s": None}, TypeError, "timeout_s=None"),
        ({"dtype": "bf16"}, TypeError, "dtype='bf16'"),
        ({"start_method": "fork"}, ValueError, "start_method='fork'"),
    ],
)
def test_arguments(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)) as raised:
        distclip.parity(**{"build": cases.build, "step": cases.step, "layouts": LAYOUTS, **changed})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (cases.nothing, "it returned None. Return the sharded model"),
        (cases.no_module, "it is a list and no nn.Module"),
    ],
)
def test_what_a_layout_must_return(layout: Any, text: str) -> None:
    task = Task(cases.build, layout, [cases.step], cases.clamp, None, 0)
    with pytest.raises(InvalidTask, match=re.escape(text)):
        Worker(0, 1).prepare(pickle.dumps(task))


def test_a_function_that_ranks_cannot_import() -> None:
    pickled = pickle.dumps(cases.build).replace(b"build", b"built")
    with pytest.raises(InvalidTask, match=r"cannot run the functions on the ranks.*'built'"):
        Worker(0, 1).prepare(pickled)


@pytest.mark.parametrize("found", ["1.0", torch.ones(2), True, object()])
def test_what_a_clip_must_return(found: object) -> None:
    with pytest.raises(TypeError, match="Return the total norm before clipping, as a number"):
        as_number(found)
    assert as_number(torch.tensor([2.0])) == as_number(2) == 2
    assert as_number(None) is None


@pytest.mark.parametrize("found", [[], {"a": 1.0}, {1: torch.ones(1)}, None])
def test_what_gradients_must_return(found: object) -> None:
    with pytest.raises(TypeError, match="cannot compare what `gradients` returned"):
        gradient_pieces(cases.build(), lambda model: found)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"build": build_by_rank}, "build() made other weights on rank 0 than in one process"),
        ({"step": cases.only_whole}, "step 0 of ddp: it left no gradients on any rank"),
    ],
)
def test_what_only_the_ranks_find(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        distclip.parity(
            **{"build": cases.build, "step": cases.step, "layouts": LAYOUTS, **changed},
            start_method="forkserver",
        )
