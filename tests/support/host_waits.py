"""What a call launches on an accelerator, and where it makes the host wait for one.

`Watch` works on the device of `accelerator.py`, which tells of both; and of Triton's kernels, which
run in the interpreter there.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import distclip
from tests.support import accelerator

PACKAGE = str(Path(distclip.__file__).parent)
OPTIMIZERS = str(Path(torch.optim.__file__).parent)


class Seen(NamedTuple):
    """A launch or a wait.

    Attributes:
        what: the operator or kernel.
        where: the function of distclip that did it, "step.decide"; "" where none is on the stack,
            as in an optimizer's own step.
        stack: all of distclip's functions on the stack, the innermost first.
    """

    what: str
    where: str
    stack: tuple[str, ...]


class Watch:
    """In a `with`: `launches` and `waits` on the accelerator."""

    active: ClassVar[Watch | None] = None

    def __init__(self) -> None:
        self.launches: list[Seen] = []
        self.waits: list[Seen] = []

    def __enter__(self) -> Watch:
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(self._tell)
        torch.toy._library.watch(self._callback)
        Watch.active = self
        return self

    def __exit__(self, *_: object) -> None:
        torch.toy._library.watch(None)
        Watch.active = None

    def launched(self, kernel: str) -> None:
        self._tell(b"launch", f"triton {kernel}".encode())

    def _tell(self, kind: bytes, what: bytes) -> None:
        stack = tuple(_functions(sys._getframe()))
        seen = Seen(what.decode(), stack[0] if stack else "", stack)
        (self.waits if kind == b"wait" else self.launches).append(seen)


def _functions(frame: FrameType | None) -> Iterator[str]:
    """Of distclip; none where one of torch's optimizers is nearer, as in a step of its own."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OPTIMIZERS):
            return
        if path.startswith(PACKAGE):
            module = path[len(PACKAGE) + 1 : -len(".py")].replace("/", ".")
            yield f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back


def use_triton() -> None:
    """Gives the accelerator the kernels of CUDA in this process; Triton interprets them.

    Nothing is prepared, because an interpreter compiles nothing.
    """
    from distclip import kernels
    from distclip.kernels import cuda
    from tests.support.triton_launches import wrap_launches

    choose = kernels._choose

    def on_host(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> None:
            if Watch.active is not None:
                Watch.active.launched(name)
            launch(*map(_on_host, args), **{k: _on_host(v) for k, v in options.items()})

        return run

    kernels._choose = lambda device: cuda if device.type == accelerator.NAME else choose(device)
    wrap_launches(on_host)
    cuda.prepare = cuda.prepare_units = lambda *_: None


def _on_host(argument: Any) -> Any:
    return accelerator.host_view(argument) if isinstance(argument, Tensor) else argument


PAGE = Path(__file__).parents[2] / "docs" / "accelerators.md"


def table(first_column: str) -> list[dict[str, str]]:
    """The rows of the table of docs/accelerators.md whose first column has that name."""
    lines = [line.strip() for line in PAGE.read_text().splitlines()]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[0] == first_column and len(row) > 1)
    found = itertools.takewhile(lambda row: len(row) > 1, rows[start + 2 :])
    return [dict(zip(rows[start], row, strict=True)) for row in found]
