"""The oldest torch that distclip runs with; `import distclip` imports this module first.

FSDP2 of torch 2.8 sums gradients on CPUs where it should average them.
"""

from __future__ import annotations

import torch

OLDEST = (2, 9)

if tuple(int(number) for number in torch.__version__.split(".")[:2]) < OLDEST:
    needed = ".".join(map(str, OLDEST))
    raise ImportError(
        f"distclip needs torch {needed} or later, and torch {torch.__version__} is installed: "
        f'`pip install "torch>={needed}"`.'
    )
