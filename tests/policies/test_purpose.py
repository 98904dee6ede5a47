"""What adaptive policies are for: corrupted batches do not undo the training of a small LSTM."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import AdaGC, AutoClip, ClipNorm, Clipper, ZClip

CORRUPTED = (60, 75, 90)
STEPS = 150


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.lstm = nn.LSTM(16, 48, batch_first=True)
        self.head = nn.Linear(48, 128)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(text))[0])


def last_loss(policy: distclip.Policy, corrupted: tuple[int, ...] = CORRUPTED) -> float:
    """The mean loss of the last ten steps on the source of a module of the standard library.

    The loss of a corrupted batch is multiplied by 300.
    """
    text = torch.tensor(list(Path(json.__file__).read_bytes())).clamp(max=127)
    torch.manual_seed(0)
    model = Bytes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    clipper = Clipper(model, policy)
    losses: list[float] = []
    for step in range(STEPS):
        starts = torch.randint(len(text) - 33, (16,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([text[s : s + 33] for s in starts])
        if step in corrupted:
            batch = torch.randint(128, batch.shape, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(
            model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        )
        (loss * (300 if step in corrupted else 1)).backward()
        clipper.clip_()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.fixture(scope="module")
def spoilt() -> float:
    clean, spoilt = last_loss(ClipNorm(math.inf), corrupted=()), last_loss(ClipNorm(math.inf))
    assert clean < 2.6, clean
    assert spoilt > 4.0 or math.isnan(spoilt)  # the batches do harm
    return spoilt


@pytest.mark.parametrize(
    "policy",
    [AutoClip(50.0), ZClip(warmup_steps=25, max_norm=math.inf), AdaGC(warmup_steps=25)],
    ids=lambda policy: type(policy).__name__,
)
def test_corrupted_batches_do_not_undo_the_training(policy: distclip.Policy, spoilt: float) -> None:
    assert last_loss(policy) < 2.8 < spoilt or math.isnan(spoilt)
