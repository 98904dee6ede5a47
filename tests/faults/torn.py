"""Trainings that are killed, or whose disk is full, again and again; each resume is looked at.

After every end, readers find the steps of an undisturbed run, none lost and none doubled, and every
checkpoint that has its name holds the bits of that run. The last start ends as that run does.
"""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from distclip.monitoring.lines import FILE_NAME
from distclip.monitoring.records import HistoryError, read_run
from tests.faults.small_disk import drop_ballast, small_disk
from tests.faults.torn_start import Ended, Moment, start
from tests.launch.runs import TINY
from tests.support.rows import Row, rows_of, without_seconds

STEPS, SAVE_EVERY = 24, 2
LEFT = {FILE_NAME, "report.png", "checkpoints", "checkpoints.owner"}
MOST_STARTS = 60  # of one run; each goes on by a checkpoint or two
DISK = "3m"  # three checkpoints of half a megabyte, and a picture


class Kind(NamedTuple):
    """A training; the policy has a state that a wrong resume would change."""

    size: int
    options: tuple[str, ...]


ZCLIP = "--policy zclip --policy.z-thresh 0.5 --policy.warmup-steps 2 --policy.max-norm inf"
ADAGC = "--policy adagc --policy.warmup-steps 2"
KINDS = (
    Kind(1, (*ZCLIP.split(), "--tensor-norms", "3")),
    Kind(2, (*ADAGC.split(), "--layout", "fsdp2")),
)


class Undisturbed(NamedTuple):
    """
    Attributes:
        states: the text of each checkpoint, by its step: weights, optimizer, policy, bit for bit.
    """

    rows: list[Row]
    states: dict[int, str]


@dataclass
class Tally:
    """What happened, and what was wrong."""

    num: Counter[str] = field(default_factory=Counter[str])
    findings: list[str] = field(default_factory=list[str])


def undisturbed(kind: Kind, text: Path, folder: Path) -> Undisturbed:
    out = folder / "out"
    ended = start(out, _words(kind, text, out), kind.size, None, num_kept=STEPS)
    assert ended.codes == [0] * kind.size, ended.said
    states = {_step(path): state_of(path) for path in (out / "checkpoints").iterdir()}
    assert len({*states.values()}) == STEPS / SAVE_EVERY
    return Undisturbed(rows_of(out), states)


def play(
    kind: Kind,
    text: Path,
    folder: Path,
    right: Undisturbed,
    moments: Iterator[Moment],
    tally: Tally,
) -> None:
    """One run, started again until it ends: at the moments, then undisturbed."""
    run = _Run(kind, text, folder / "out", right, tally)
    for moment in moments:
        if run.go_on(moment):
            break
    else:
        run.go_on(None)
    run.look_at_the_end()


class _Run:
    def __init__(self, kind: Kind, text: Path, out: Path, right: Undisturbed, tally: Tally) -> None:
        self.kind, self.out, self.right, self.tally = kind, out, right, tally
        self.words = _words(kind, text, out)
        self.newest, self.num_starts = 0, 0
        self.moment: Moment | None = None
        self.ended = Ended([], "")

    def go_on(self, moment: Moment | None) -> bool:
        """One start; whether the run has ended by itself."""
        self.moment = moment
        resume = ["--resume"] if self.num_starts else []
        self.ended = start(self.out, [*self.words, *resume], self.kind.size, moment)
        self.num_starts += 1
        drop_ballast(self.out.parent)
        if self.newest and "step " in self.ended.said:
            self._expect(f"going on after step {self.newest}," in self.ended.said, "another step")
        self.tally.num["resumes from a checkpoint"] += self.newest > 0
        self._count()
        self._look_at_history(self._look_at_checkpoints())
        return self.ended.finished

    def _count(self) -> None:
        num, codes, said = self.tally.num, self.ended.codes, self.ended.said
        num["starts"] += 1
        if self.ended.killed:
            num["kills"] += 1
            num["kills of one rank alone"] += bool(self.moment and self.moment.alone)
        elif not self.ended.finished:
            num["full disks"] += 1
            lines = [line for line in said.splitlines() if "rror" in line]
            self._expect(codes == [2] * self.kind.size, f"codes {codes}")
            self._expect(len(lines) == 1 and lines[0].startswith("train.py: error: "), "lines")
            reasons = ("No space left on device", "fewer bytes than it was given (0.")
            self._expect(any(reason in said for reason in reasons), "no reason")
        for name in ("unfinished-*", "discarded-*"):
            num[f"left {name}"] += bool([*(self.out / "checkpoints").glob(name)])
        num["left history.tmp"] += (self.out / FILE_NAME).with_suffix(".tmp").exists()

    def _look_at_checkpoints(self) -> int:
        """The newest step that has a complete one."""
        newest = 0
        for path in sorted((self.out / "checkpoints").glob("step-*")):
            newest = _step(path)
            self._expect(state_of(path) == self.right.states.get(newest), f"{path.name} differs")
        self._expect(newest >= self.newest, f"step {self.newest} is gone, {newest} is there")
        self.newest = newest
        return newest

    def _look_at_history(self, newest: int) -> None:
        rows = without_seconds(rows_of(self.out))
        right = without_seconds(self.right.rows)[: len(rows)]
        for row, expected in zip(rows, right, strict=True):
            row.pop("tensor_norms", None)  # every third step of this process
            expected.pop("tensor_norms", None)
            self._expect(row == expected, f"{row} instead of {expected}")
        self._expect(len(rows) >= newest, f"{len(rows)} rows, and a checkpoint of {newest}")
        with contextlib.suppress(HistoryError):
            run = read_run(self.out)
            self.tally.num["cut lines"] += run.num_broken
            self._expect(run.num_broken <= 1, f"{run.num_broken} broken lines")

    def look_at_the_end(self) -> None:
        self.tally.num["runs"] += 1
        self._expect(self.ended.finished, "no end")
        self._expect(len(rows_of(self.out)) == STEPS, "rows are missing")
        left = {path.name for path in self.out.iterdir()}
        self._expect(left == LEFT, f"left {sorted(left ^ LEFT)}")
        names = sorted(path.name for path in (self.out / "checkpoints").iterdir())
        kept = [f"step-{step:07d}" for step in (STEPS - SAVE_EVERY, STEPS)]
        self._expect(names == kept, f"left {names}")

    def _expect(self, right: bool, what: str) -> None:
        if not right:
            said = self.ended.said[-2000:]
            self.tally.findings.append(
                f"{self.kind}, start {self.num_starts}, {self.moment}, codes {self.ended.codes}: "
                f"{what}\n{said}"
            )


def moments(drawn: random.Random, kind: Kind, *, full: bool) -> Iterator[Moment]:
    """Most are at a file operation: a save has about 25 on rank 0, and a start begins with 15."""
    for _ in range(MOST_STARTS):
        rank = drawn.randrange(kind.size)
        operation = drawn.randint(1, 35 if rank else 110)
        if full and drawn.random() < 0.7:
            yield Moment(0, operation, free=drawn.choice([0, 4096, drawn.randint(0, 600_000)]))
        elif drawn.random() < 0.25:
            yield Moment(seconds=drawn.uniform(0.05, 1.5))
        else:
            alone = kind.size > 1 and drawn.random() < 0.4
            seconds = drawn.choice([0.0, drawn.uniform(0.0, 0.004)])
            yield Moment(rank, operation, seconds, alone)


def campaign(
    kind: Kind, text: Path, folder: Path, right: Undisturbed, seed: int, kills: int, disks: int = 0
) -> Tally:
    """Runs of one kind, until so many kills and so many full disks have been seen."""
    drawn, tally = random.Random(seed), Tally()
    for number in range(10_000):
        more_kills, more_disks = kills > tally.num["kills"], disks > tally.num["full disks"]
        if not more_kills and not more_disks:
            break
        full = more_disks and (number % 2 == 0 or not more_kills)
        with contextlib.ExitStack() as stack:
            each = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            if full:
                stack.enter_context(small_disk(each, DISK))
            some = _until(moments(drawn, kind, full=full), tally, kills, disks)
            play(kind, text, each, right, some, tally)
    return tally


def _until(some: Iterator[Moment], tally: Tally, num_kills: int, num_full: int) -> Iterator[Moment]:
    for moment in some:
        if tally.num["kills"] >= num_kills and tally.num["full disks"] >= num_full:
            return
        yield moment


def state_of(checkpoint: Path) -> str:
    """All that is in it, as text: numbers bit for bit."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            dcp_to_torch_save(str(checkpoint), file.name)
            return _text(torch.load(file.name, weights_only=False))
        except Exception as error:
            return f"cannot be read: {error}"


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        bits = value.reshape(-1).view(torch.uint8).numpy().tobytes().hex()
        return f"{value.dtype} {tuple(value.shape)} {bits}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(value[key])}" for key in sorted(value)) + "}"
    return re.sub(r"\s+", " ", repr(value))


def _words(kind: Kind, text: Path, out: Path) -> list[str]:
    counts = ("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--timeout", "60")
    return ["--data", str(text), "--out", str(out), *TINY, *counts, *kind.options]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
