"""Which reader reads a parameter, and what a declaration changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip.sharding import BlockShard, Layout, ParamShard, read
from distclip.sharding.read import named_parameters, read_layouts
from distclip.sharding.tensor_layout import ParamReader, TensorLayout


def over_ep(name: str, param: Tensor) -> Layout:
    return Layout(sharded=frozenset({"ep"}))


@pytest.mark.parametrize(
    "policy", [distclip.ClipBlockRMS(0.5), distclip.AGC(0.1), distclip.ClipTensorNorm(1.0)], ids=str
)
def test_in_one_process_a_declared_axis_changes_nothing(policy: distclip.Policy) -> None:
    """One process needs no mesh: the axis has one rank there, and divides nothing."""
    grads: list[Tensor] = []
    for layouts in (None, over_ep):
        param = nn.Parameter(torch.ones(4, 3))
        param.grad = 2 * torch.ones(4, 3)
        distclip.Clipper([("experts", param)], policy, layouts=layouts).clip_()
        grads.append(param.grad)
    assert 0 < grads[0].abs().max() < 2  # it did clip
    assert torch.equal(*grads)


@pytest.mark.parametrize("axes", ["ep", None, 3, ["ep", "ep"], [0]])
@pytest.mark.parametrize("field_name", ["sharded", "replicated"])
def test_axes_are_a_set_of_names(field_name: str, axes: object) -> None:
    with pytest.raises(distclip.LayoutError, match=f"{field_name}=.*names of mesh axes, each once"):
        Layout(**{field_name: axes})


class Rows(nn.Parameter):
    """A kind of tensor that torch does not know: it holds some rows of 4."""


def make_reader(modules: Sequence[nn.Module]) -> ParamReader:
    def read_rows(name: str, param: Tensor) -> TensorLayout | None:
        if not isinstance(param, Rows):
            return None
        shard = BlockShard((4, 3), (1, 0), (2, 3), frozenset({0}))
        return TensorLayout.without_mesh(ParamShard(name, 12, shard))

    return read_rows


def test_a_new_wrapper_is_one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "READERS", (*read.READERS, make_reader))
    named = [("rows", Rows(torch.zeros(2, 3))), ("plain", nn.Parameter(torch.zeros(2)))]
    rows, plain = read_layouts(named).params
    assert rows.shards[0].numel == 12
    assert rows.shards[0].shard.offsets == (1, 0)
    assert plain.shards == (ParamShard("plain", 2, BlockShard.whole((2,))),)


class Wrapper(nn.Module):
    """As torch's wrappers: the module is an attribute, whose name goes into those of parameters."""

    def __init__(self, attribute: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, attribute, module)


@pytest.mark.parametrize(
    "attribute", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"]
)
def test_names_are_those_of_the_bare_model(attribute: str) -> None:
    model = Wrapper(attribute, nn.Sequential(nn.Linear(2, 2), Wrapper(attribute, nn.Linear(2, 2))))
    assert [name for name, _ in named_parameters(model)] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
