"""DeepSpeed's private names, on objects that are called as its classes: a missing one raises.

A default instead would turn into a wrong norm without a word.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from distclip.adapters.deepspeed.param_slices import whole_slices
from distclip.adapters.deepspeed.partitions import (
    BufferedPartition,
    inner_optimizers,
    loss_scale,
    read_partitions,
    wait_for_offload,
)

CLASSES = [
    "FP16_UnfusedOptimizer",
    "FP16_Optimizer",
    "BF16_Optimizer",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
]


def called(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("FP16_UnfusedOptimizer", "fused_lamb_legacy"),
        ("FP16_Optimizer", "fused_adam_legacy"),
        ("DeepSpeedZeroOptimizer_Stage3", "swap_optimizer"),
    ],
)
def test_a_class_that_lost_what_rules_it_out_is_an_error(name: str, attribute: str) -> None:
    with pytest.raises(AttributeError, match=attribute):
        read_partitions(called(name))
    with pytest.raises(ValueError, match=f"cannot clip what {name} steps: "):
        read_partitions(called(name, **{attribute: True}))


@pytest.mark.parametrize("name", CLASSES)
def test_torch_autocast_in_fp16_is_an_error(name: str) -> None:
    owned = dict.fromkeys(("fused_lamb_legacy", "fused_adam_legacy", "swap_optimizer"), False)
    with pytest.raises(ValueError, match="torch autocast in fp16 scales gradients once more"):
        read_partitions(called(name, **owned, torch_autocast_gradscaler=object()))


@pytest.mark.parametrize("name", CLASSES)
def test_the_loss_scale_is_never_guessed(name: str) -> None:
    if name == "BF16_Optimizer":  # has none
        assert loss_scale(called(name)) == 1.0
        return
    assert loss_scale(called(name, loss_scale=256)) == 256.0
    with pytest.raises(AttributeError, match="loss_scale"):
        loss_scale(called(name))


@pytest.mark.parametrize("name", CLASSES)
def test_the_inner_optimizer_is_never_guessed(name: str) -> None:
    with pytest.raises(AttributeError, match=r"optimizer"):
        inner_optimizers(called(name))


def test_partial_offload_has_a_second_inner_optimizer() -> None:
    inner: dict[str, Any] = {"optimizer": "first", "offload_optimizer": True}
    name = "DeepSpeedZeroOptimizer_Stage3"
    found = inner_optimizers(called(name, **inner, partial_offload=0.5, backup_optimizer="second"))
    assert found == ["first", "second"]
    assert inner_optimizers(called(name, **inner, partial_offload=1.0)) == ["first"]
    with pytest.raises(AttributeError, match="backup_optimizer"):
        inner_optimizers(called(name, **inner, partial_offload=0.5))


class Accelerator:
    """DeepSpeed's, as far as it is asked for."""

    def __init__(self) -> None:
        self.waits = 0

    def current_stream(self) -> Accelerator:
        return self

    def synchronize(self) -> None:
        self.waits += 1


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("DeepSpeedZeroOptimizer", "cpu_offload"),
        ("DeepSpeedZeroOptimizer_Stage3", "offload_optimizer"),
    ],
)
def test_offloaded_gradients_have_arrived(
    name: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed 0.16.9 does not wait for its copies to pinned memory where overlap_comm is off."""
    accelerator = Accelerator()
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    wait_for_offload(called(name, **{attribute: False}))
    assert accelerator.waits == 0
    wait_for_offload(called(name, **{attribute: True}))
    assert accelerator.waits == 1
    with pytest.raises(AttributeError, match=attribute):
        wait_for_offload(called(name))
    monkeypatch.setattr(Accelerator, "current_stream", lambda _: None)  # that of a CPU
    wait_for_offload(called(name, **{attribute: True}))


@pytest.mark.parametrize("name", CLASSES[:3])
def test_the_others_do_not_offload(name: str) -> None:
    wait_for_offload(called(name))


SHAPES = [(6, 4), (5,), (1, 7), (), (3, 2)]


@pytest.mark.parametrize("buffers", ["flat", "two-dimensional", "one for each", "padded"])
def test_slices_of_buffers(buffers: str) -> None:
    """Each slice is the memory that DeepSpeed has, in the shape of the parameter if it is whole."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    slices = whole_slices(params)
    size = sum(param.numel() for param in params)
    values = torch.arange(float(size))
    parts = [part.clone() for part in values.split([param.numel() for param in params])]
    if buffers == "padded":
        parts = [torch.cat([part, torch.full((3,), -1.0)]) for part in parts]
        slices = [
            each._replace(shard=replace(each.shard, offset=each.shard.offset + 3 * i))
            for i, each in enumerate(slices)
        ]
    listed = {"flat": [values], "two-dimensional": [values.view(1, -1)]}.get(buffers, parts)
    partition = BufferedPartition(torch.zeros(size), slices, [0], lambda: listed)
    first = 0
    for param, found in zip(params, partition.gradients(), strict=True):
        assert found.shape == param.shape
        expected = values[first : first + param.numel()].view(param.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        first += param.numel()
        found.fill_(-2)
    written = sum(int((each == -2).sum()) for each in listed)
    assert written == size
