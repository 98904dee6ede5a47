"""A gradient that vanishes, one that explodes, and the same network repaired.

python examples/gradient_flow.py runs/gradient_flow
distclip report runs/gradient_flow/vanishing
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distclip

NUM_LAYERS, WIDTH, NUM_CLASSES = 16, 48, 3
STEPS, BATCH, LEARNING_RATE = 200, 128, 1e-3


class Network(nn.Module):
    """Sixteen layers between a point in the plane and three classes."""

    def __init__(self, activation: nn.Module, gain: float | None = None) -> None:
        super().__init__()
        sizes = pairwise([2] + [WIDTH] * NUM_LAYERS)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(fan_in, fan_out), activation) for fan_in, fan_out in sizes
        )
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        if gain is not None:
            for linear, _ in self.layers:
                nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ResidualNetwork(Network):
    """As deep, and each layer adds to what comes in: the gradient also flows around it."""

    def __init__(self) -> None:
        super().__init__(nn.Tanh())
        for layer in self.layers[1:]:
            layer.insert(0, nn.LayerNorm(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = x + layer(x) / NUM_LAYERS
        return self.head(self.norm(x))


def vanishing() -> Network:
    """The slope of a sigmoid is at most a quarter, and torch's first weights are small."""
    return Network(nn.Sigmoid())


def exploding() -> Network:
    """The first weights are so large that each layer multiplies the gradient."""
    return Network(nn.Tanh(), gain=5.0)


def spirals(num_points: int) -> tuple[Tensor, Tensor]:
    """Points on the arms of a spiral, and the arm of each; [points, 2] and [points]."""
    classes = torch.randint(NUM_CLASSES, (num_points,))
    radius = torch.rand(num_points).sqrt()
    noise = 0.6 * torch.randn(num_points)
    angle = 4 * radius + classes * (2 * math.pi / NUM_CLASSES) + noise
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), classes


def train(model: nn.Module, folder: Path, max_norm: float = math.inf, steps: int = STEPS) -> None:
    """Trains, and leaves a history of every step in the folder. By default nothing is clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    clipper = distclip.Clipper(model, distclip.ClipNorm(max_norm), tensor_norms=2)
    with distclip.History(folder, after=0) as history:
        for _ in range(steps):
            points, classes = spirals(BATCH)
            loss = cross_entropy(model(points), classes)
            loss.backward()
            report = clipper.step(optimizer)
            optimizer.zero_grad()
            history.append(report, loss=loss.detach(), lr=LEARNING_RATE)


def main(folder: Path) -> None:
    for name, make, max_norm in (
        ("vanishing", vanishing, math.inf),
        ("exploding", exploding, math.inf),
        ("repaired", ResidualNetwork, 1.0),
    ):
        torch.manual_seed(0)
        train(make(), folder / name, max_norm)
        print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gradient_flow"))
