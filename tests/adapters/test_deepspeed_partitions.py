"""DeepSpeed's private names, on objects that are called as its classes: a missing one raises.

A default instead would turn into a wrong norm without a word.
"""

from __future__ import annotations

from typing import Any

import pytest

from distclip.adapters.deepspeed.partitions import inner_optimizers, loss_scale, read_partitions

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
