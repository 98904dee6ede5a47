"""What the state machine draws from: policies, optimizers, sizes of gradients, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distclip.policies import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    Policy,
    SkipSpike,
    ZClip,
)

SHAPES = {"w": (3, 2), "b": (3,), "s": (), "u": (2, 2, 2), "e": (0, 3)}
LATE = {"late0": (4,), "late1": (2, 3)}  # in no Clipper at first
POLICIES: dict[str, Policy[Any]] = {
    "norm": ClipNorm(0.7),
    "norm, p = 1": ClipNorm(2.3, 1.0),
    "norm, p = inf": ClipNorm(0.3, math.inf),
    "measures": ClipNorm(math.inf),
    "tensor": ClipTensorNorm(0.4),
    "rms": ClipBlockRMS(0.11),
    "value": ClipValue(0.23),
    "agc": AGC(0.05, eps=0.013),
    "agc, p = 1": AGC(0.05, norm_type=1.0),
    "autoclip": AutoClip(37.0, history=4),
    "zclip": ZClip(1.7, alpha=0.8, warmup_steps=3, max_norm=None),
    "zclip, bound": ZClip(warmup_steps=2, max_norm=1.9),
    "adagc": AdaGC(1.05, 1.3, 0.9, warmup_steps=2),
    "adagn": AdaGN(),
    "adagn, eps": AdaGN(0.3, 0.5, eps=0.2),
    "aggc": AGGC(),
    "aggc, wide": AGGC(0.6, 1.4, 0.5, 0.0, math.inf),
    "aggc, late": AGGC(0.9, 0.0, 0.8, 0.5, 3.0, 0.2, 1.1, late_from=1.0, late_steps=3.0),
    "spike": SkipSpike(3.3, window=4),
    "spike and norm": SkipSpike(2.1, window=4, max_norm=1e3) & ClipNorm(0.9),
    "spike and aggc": SkipSpike(2.1, window=4) & AGGC(0.8, 1.2, 0.6),
    "three": ClipNorm(3.1) & AutoClip(60.0, history=3) & ZClip(warmup_steps=2, max_norm=None),
    "per tensor": ClipTensorNorm(0.6) & AdaGC(warmup_steps=2),
}
# Drawn more often than others, because they need several steps.
VETOES = ("spike", "spike and norm", "spike and aggc")
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.125, momentum=0.5),
    # torch's fused SGD with momentum raises where parameters get their first gradients in turn.
    "sgd fused": lambda params: torch.optim.SGD(params, lr=0.125, fused=True),
    "adamw foreach": lambda params: torch.optim.AdamW(params, lr=0.125, foreach=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.125, fused=True),
}
SIZES = [0.0, 1e-30, 1e-3, 0.3, 0.3, 0.3, 0.6, 1.0, 1.0, 4.0, 100.0, 1e25]
POISONS = [math.nan, math.inf, -math.inf, 3e38]
# Of the loss that is judged: None for none; a tensor has one element.
LOSSES = [None, None, 0.5, 0.75, 1.0, torch.tensor([1.25]), -0.5, 30.0]
WRONG_LOSSES = [math.nan, math.inf, torch.tensor(-math.inf), 1e30]
