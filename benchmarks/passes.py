"""From loss-scaled gradients to the step: what torch reads and writes of each gradient, and what distclip does.

    python -m benchmarks.passes [--save] [--elements N] [--rounds N]

Bytes are counted, not timed: every operator that is called on a gradient counts what it reads and writes of it once.
Temporaries do not count on either side. Times are of the same work on this machine, the rivals in turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from benchmarks.correctness import RESULTS, about_this_run, plain_text

WAYS = ("torch", "clip_", "step")
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW, fused": lambda params: AdamW(params, fused=True),
    "SGD with momentum, fused": lambda params: SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "AdamW, foreach": lambda params: AdamW(params, foreach=True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ONLY_WRITE = {"aten::copy_", "aten::zero_", "aten::fill_"}
LEGEND = [
    "torch: scaler.unscale_, torch.nn.utils.clip_grad_norm_, scaler.step. clip_: clipper.clip_(optimizer, scaler), "
    "scaler.step. step: clipper.step(optimizer, scaler).",
    "Bytes: read + written of a gradient element, counted by operator. Every step clips. Times: median (p20 to p80) "
    "of the rounds, and the ratio of the medians to torch's.",
]


class Work:
    """Gradients that are scaled and too large, and one step with them."""

    def __init__(self, optimizer: str, dtype: str, way: str, sizes: list[int]) -> None:
        self.params = [nn.Parameter(torch.ones(n, dtype=DTYPES[dtype])) for n in sizes]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.scaler = GradScaler("cpu", init_scale=256.0)
        self.clipper = distclip.Clipper(self.params, distclip.ClipNorm(1.0))
        self.way = way

    def prepare(self) -> None:
        self.scaler.scale(torch.zeros(()))
        for param in self.params:
            param.grad = torch.full_like(param, 256.0)

    def run(self) -> Tensor:
        """The norm before clipping."""
        if self.way == "step":
            norm = self.clipper.step(self.optimizer, self.scaler).total_norm
        elif self.way == "clip_":
            norm = self.clipper.clip_(self.optimizer, self.scaler).total_norm
            self.scaler.step(self.optimizer)
        else:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.params, 1.0)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm


class Traffic(TorchDispatchMode):
    """Counts the bytes of some tensors that operators read and write."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._watched = {t.untyped_storage().data_ptr() for t in tensors}
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            self._count(func, {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs})
        return func(*args, **kwargs)

    def _count(self, func: Any, given: dict[str, Any]) -> None:
        read: dict[tuple[int, int], int] = {}  # an operator that is given a tensor twice reads it once
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if "_fused_" in func._schema.name and argument.name == "grads":
                writes = given.get("grad_scale") is not None  # the kernels write gradients back only then
            for t in tensors_in(given.get(argument.name)):
                if t.untyped_storage().data_ptr() in self._watched:
                    self.written += t.nbytes * writes
                    if not (writes and func._schema.name in ONLY_WRITE):
                        read[t.data_ptr(), t.numel()] = t.nbytes
        self.read += sum(read.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, Tensor):
            yield one


def bytes_per_element(optimizer: str, dtype: str, way: str, sizes: list[int]) -> tuple[float, float]:
    """Read and written, of a gradient element, in the second step: the first makes the optimizer's state."""
    work = Work(optimizer, dtype, way, sizes)
    work.prepare()
    work.run()
    work.prepare()
    grads = [p.grad for p in work.params if p.grad is not None]
    with Traffic(grads) as traffic:
        norm = work.run()
    assert norm > 1, "nothing was clipped"
    return traffic.read / sum(sizes), traffic.written / sum(sizes)


def times(optimizer: str, dtype: str, sizes: list[int], rounds: int) -> dict[str, Tensor]:
    """Seconds of each round, by way: the ways take turns, so that all see the same machine."""
    works = {way: Work(optimizer, dtype, way, sizes) for way in WAYS}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 2):
        for way, work in works.items():
            work.prepare()
            begin = time.perf_counter()
            work.run()
            taken[way].append(time.perf_counter() - begin)
    return {way: torch.tensor(seconds[2:]) for way, seconds in taken.items()}


def table(num_elements: int, rounds: int) -> list[list[str]]:
    lines = [["optimizer", "gradients", *(f"{way}: {what}" for what in ("bytes", "ms") for way in WAYS), "ratios"]]
    sizes = [num_elements // 8] * 8
    for optimizer in OPTIMIZERS:
        for dtype in DTYPES:
            counted = [bytes_per_element(optimizer, dtype, way, [4096, 512, 33]) for way in WAYS]
            measured = times(optimizer, dtype, sizes, rounds)
            medians = [measured[way].median().item() for way in WAYS]
            ratios = ", ".join(f"{way} {m / medians[0]:.2f}" for way, m in zip(WAYS[1:], medians[1:], strict=True))
            cells = [f"{read:g} + {written:g}" for read, written in counted]
            lines.append([optimizer, dtype, *cells, *(spread(measured[way]) for way in WAYS), ratios])
    return lines


def spread(seconds: Tensor) -> str:
    p20, p50, p80 = (1e3 * seconds.quantile(torch.tensor([0.2, 0.5, 0.8]))).tolist()
    return f"{p50:.1f} ({p20:.1f} to {p80:.1f})"


def markdown(lines: list[list[str]], about: dict[str, Any]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])]
    facts = [f"- {name}: {value}" for name, value in about.items()]
    title = "# From loss-scaled gradients to the step: bytes and time"
    how = "Made by `python -m benchmarks.passes --save`."
    return "\n".join([title, "", *facts, "", *rows, "", *(f"{line}\n" for line in LEGEND), how, ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes", description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/passes-DATE.md")
    parser.add_argument("--elements", type=int, default=1 << 23, help="of the gradients that are timed")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    lines = table(options.elements, options.rounds)
    about = about_this_run(time.perf_counter() - begin) | {
        "work": f"{options.elements:,} elements in 8 tensors, {options.rounds} rounds, "
        f"{torch.get_num_threads()} threads"
    }
    print(plain_text(lines), *LEGEND, *(f"{name}: {value}" for name, value in about.items()), sep="\n")
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"passes-{date.today().isoformat()}.md").write_text(markdown(lines, about))


if __name__ == "__main__":
    sys.exit(main())
