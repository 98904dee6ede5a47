"""Small models that are really trained, each with a history: healthy, or with a known cause."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from distclip import ClipNorm, Clipper
from distclip.monitoring import History
from distclip.monitoring.records import Run, read_run

Loss = Callable[[int], Tensor]
Hook = Callable[[int, nn.Module], None]


def train(
    folder: Path,
    model: nn.Module,
    loss: Loss,
    steps: int,
    *,
    lr: float = 0.05,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    limit: float = 1.0,
    tensor_norms: int | bool = True,
    find_nonfinite: bool = False,
    hook: Hook | None = None,
) -> Run:
    """Trains, with steps from 1 on; `hook` is called with the step and the gradients in place."""
    clipper = Clipper(model, ClipNorm(limit), tensor_norms=tensor_norms)
    optimizing = optimizer(model.parameters(), lr=lr)
    with History(folder) as history:
        for step in range(1, steps + 1):
            value = loss(step)
            value.backward()
            if hook is not None:
                hook(step, model)
            report = clipper.step(optimizing)
            found = report.nonfinite_parameters() if find_nonfinite else None
            history.append(report, nonfinite_parameters=found, loss=value.detach())
            optimizing.zero_grad()
    return read_run(folder)


def stack(
    activation: type[nn.Module], depth: int, gain: float | None = None, width: int = 24
) -> nn.Sequential:
    """Linear layers "0", "2", ...; torch's initialization, or a standard deviation of gain / √n."""
    torch.manual_seed(depth)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, 4))
    for layer in model:
        if gain is not None and isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(width))
    return model


def classify(model: nn.Module, seed: int = 0, width: int = 24) -> Loss:
    """Which of four random directions is the nearest."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(width, 4, generator=generator)

    def loss(_: int) -> Tensor:
        x = torch.randn(32, width, generator=generator)
        return functional.cross_entropy(model(x), (x @ directions).argmax(dim=1))

    return loss


def next_token(model: nn.Module, seed: int) -> Loss:
    """The next token of a random Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    transitions = (torch.randn(16, 16, generator=generator) * 2).softmax(dim=1)

    def loss(_: int) -> Tensor:
        tokens = [torch.randint(0, 16, (8,), generator=generator)]
        for _ in range(12):
            chances = transitions[tokens[-1]]
            tokens.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
        sequence = torch.stack(tokens, dim=1)
        logits = model(sequence[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten())

    return loss


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        self.lstm = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        return self.head(hidden)


def healthy(folder: Path, kind: str, seed: int, steps: int = 100) -> Run:
    if kind == "mlp":
        model = stack(nn.ReLU, 2 + seed, gain=math.sqrt(2))
        return train(folder, model, classify(model, seed), steps, lr=0.05, limit=2.0)
    torch.manual_seed(seed)
    model = Lstm() if kind == "lstm" else Transformer()
    adam = torch.optim.AdamW
    return train(folder, model, next_token(model, seed), steps, lr=5e-3, optimizer=adam)
