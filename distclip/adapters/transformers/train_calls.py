"""Which Trainer's `train()` runs, for the callback in it that clips.

A callback is not given its trainer, and is not called where training ends with an exception.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

from transformers import Trainer, TrainerCallback, trainer_utils


class FollowsTrain(TrainerCallback):
    """A callback that knows the trainer whose `train()` runs, and learns of its end.

    Attributes:
        trainer: None outside of `train()`.
        checkpoint: the folder that it resumes from.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.checkpoint: str | None = None

    def end(self) -> None:
        """Called where `train()` ends, after an exception too."""


@contextmanager
def following(
    trainer: Any, train: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[None]:
    """Around each `train(*args, **kwargs)`; `DistClipMixin` and the wrapper call it."""
    callbacks = cast("list[Any]", trainer.callback_handler.callbacks)
    found = [each for each in callbacks if isinstance(each, FollowsTrain)]
    if len(found) > 1:
        raise ValueError(
            f"cannot train with {len(found)} DistClip in the callbacks of this "
            f"{type(trainer).__qualname__}: each would clip what the other has clipped. Give "
            f"one; for the smaller limit of two policies, `DistClip(first & second)`."
        )
    if not found:
        yield
        return
    (clip,) = found
    if clip.trainer is trainer:  # the mixin has begun, for a `train` that calls another
        clip.checkpoint = _checkpoint_of(trainer, train, args, kwargs) or clip.checkpoint
        yield
        return
    if clip.trainer is not None:
        raise ValueError(
            f"cannot train this {type(trainer).__qualname__} with a DistClip that is clipping "
            f"for another trainer now. Give each its own."
        )
    clip.checkpoint = _checkpoint_of(trainer, train, args, kwargs)
    clip.trainer = trainer
    try:
        yield
    finally:
        clip.end()
        clip.trainer = clip.checkpoint = None


class DistClipMixin:
    """For trainers whose own `train` does not call that of `transformers.Trainer`.

    `class MyTrainer(DistClipMixin, ThatTrainer)`, with `callbacks=[DistClip(policy)]` as always.

    A callback alone is given neither its trainer nor the DeepSpeed engine, it is not called where
    training ends with an exception, and it has no event between backward and the Trainer's own
    clipping. So the first DistClip that is made wraps `transformers.Trainer.train`; this class does
    the same by inheritance.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        train = cast(Any, super()).train
        with following(self, train, args, kwargs):
            return train(*args, **kwargs)


@functools.cache  # once
def wrap_train() -> None:
    """Lets every `Trainer.train` begin and end what its DistClip does."""
    train = cast("Callable[..., Any]", Trainer.train)

    @functools.wraps(train)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with following(self, functools.partial(train, self), args, kwargs):
            return train(self, *args, **kwargs)

    cast(Any, Trainer).train = followed


def _checkpoint_of(
    trainer: Any, train: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """The folder that `train` resumes from."""
    given = inspect.signature(train).bind_partial(*args, **kwargs).arguments
    name = "resume_from_checkpoint"
    checkpoint = given.get(name, kwargs.get(name))  # kwargs: of a `train(self, **kwargs)`
    if checkpoint is True:
        # None: the Trainer raises.
        return cast(Any, trainer_utils).get_last_checkpoint(trainer.args.output_dir)
    return checkpoint or None
