"""Checkpoints that are whole or not there: written under another name, renamed when all is written.

Disks lose what they have taken, and so a checkpoint names the checksums of its files. Where the
newest is damaged, a run goes on from the one before.

Two starts of one run may be alive at once, where a node was cut off and the run went on elsewhere.
Each start claims the folder with a token of its own; only the last to claim it may complete a
checkpoint.
"""

import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launch import run_facts
from launch.files import describe, errors_as, one_line, sync
from launch.ranks import UserError, agree, gather, on_rank_0
from launch.trainers import Trainer

NUM_KEPT = 2
OWNER = ".owner"  # beside the folder of checkpoints
SECONDS_TO_SHARE = 10.0  # network file systems remember for seconds that a file was not there


class Checkpoints:
    """The checkpoints of a run in one folder, claimed for this start.

    Collective: every rank must make it, and call `save` and `load`.

    Args:
        facts: what has to be the same for a resumed run to go on as if it had never stopped.
        resume: keep the complete checkpoints of earlier starts.

    Raises:
        UserError: on every rank, where the folder cannot be used or not all ranks share it.
    """

    def __init__(
        self, folder: Path, trainer: Trainer, facts: dict[str, Any], *, resume: bool
    ) -> None:
        self.folder, self.trainer, self.facts = folder, trainer, facts
        self.owner = folder.with_suffix(OWNER)
        self.damaged: list[Path] = []  # found by `load`; removed when there is a newer one
        self.token = on_rank_0(lambda: self._claim(resume))
        agree(self._check_shared)

    def _claim(self, resume: bool) -> str:
        """Removes what killed runs left half-written or half-removed; unless resuming, all."""
        self.token = uuid.uuid4().hex
        with errors_as(f"--out {self.folder.parent} cannot be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder.with_suffix(f".{self.token}")
            temporary.write_text(self.token)
            temporary.rename(self.owner)
            for path in self.folder.parent.glob(f"{self.folder.stem}.{'[0-9a-f]' * 32}"):
                path.unlink(missing_ok=True)  # of a start that ended in these lines
            steps = self._steps()
            halves = [p for name in ("unfinished-*", "discarded-*") for p in self.folder.glob(name)]
            for path in [*steps, *halves]:
                _check_folder(path)
            for path in halves if resume else [*halves, *steps]:
                self._discard(path)
        return self.token

    def _discard(self, path: Path) -> None:
        # Renamed before it is removed: an earlier start that completes it has all of it, or none.
        name = re.sub(r"^(discarded-[0-9a-f]{32}-)+", "", path.name)
        renamed = path.with_name(f"discarded-{self.token}-{name}")
        try:
            path.rename(renamed)
        except FileNotFoundError:
            return
        if renamed.is_symlink():
            renamed.unlink()
        shutil.rmtree(renamed, ignore_errors=True)  # a rank that is cut off may still write into it

    def _read_owner(self) -> str | None:
        """The token of the last start that claimed the folder; None where it cannot be read."""
        try:
            return self.owner.read_bytes().decode(errors="replace")
        except OSError:
            return None

    def _check_shared(self) -> None:
        until = time.monotonic() + SECONDS_TO_SHARE
        while self._read_owner() != self.token:
            if time.monotonic() > until:
                raise UserError(
                    f"--out {self.folder.parent}: {socket.gethostname()} does not see there what "
                    "rank 0 wrote: it has to be a folder that all machines share"
                )
            time.sleep(0.1)

    def _check_owned(self) -> None:
        owner = self._read_owner()
        if owner is None:
            raise UserError(
                f"{self.owner} was removed, which says whose the checkpoints are: this run ends "
                "and writes no more"
            )
        if owner != self.token:
            raise UserError(
                f"{self.folder} now belongs to a later start of this run: this one ends and "
                "writes no more"
            )

    def save(self, step: int) -> None:
        """Writes one checkpoint, and removes all but the last two.

        Raises:
            UserError: on every rank, where it cannot be written, or a later start has claimed the
                folder.
        """
        temporary = self.folder / f"unfinished-{self.token}-{step}"
        on_rank_0(self._check_owned)
        agree(lambda: self._write(temporary))
        # A name without "unfinished" says that the last rank has written its share.
        dist.barrier()
        names = on_rank_0(lambda: run_facts.names_in(temporary))
        shares = gather(agree(lambda: run_facts.checksums(temporary, names)))
        checksums = {name: crc for share in shares for name, crc in share.items()}
        on_rank_0(lambda: self._finish(temporary, step, checksums))

    def _write(self, temporary: Path) -> None:
        try:
            self.trainer.save(temporary)
        except (OSError, RuntimeError, CheckpointException) as error:
            self._check_owned()  # a later start may have discarded it in this moment
            free = _free_space(self.folder.parent)
            raise UserError(
                f"checkpoint {temporary} cannot be written: {_reason(error)} ({free})"
            ) from None

    def _finish(self, temporary: Path, step: int, checksums: dict[str, str]) -> None:
        final = self.folder / f"step-{step:07d}"
        with errors_as(f"checkpoint {final} cannot be written"):
            try:
                run_facts.write(temporary, step, self.facts, checksums)
                self._check_owned()
                if os.path.lexists(final):  # a damaged one
                    _check_folder(final)
                    self._discard(final)
                temporary.rename(final)
            except FileNotFoundError:  # a later start has discarded it in this moment
                self._check_owned()
                raise
            sync(self.folder)
            self._remove_old(final)

    def _remove_old(self, newest: Path) -> None:
        """Removes all but the last two; damaged ones, and what was left of them, as well."""
        kept = self._kept(newest)
        for path in self._steps():
            if path not in kept and path.is_dir():
                self._discard(path)
        self.damaged = []

    def _remove_before(self, newest: Path) -> None:
        """Removes what is older than the last two."""
        for path in self.complete():
            if _step(path) < _step(self._kept(newest)[0]):
                self._discard(path)

    def _kept(self, newest: Path) -> list[Path]:
        whole = [p for p in self.complete() if p == newest or p not in self.damaged]
        return [path for path in whole if _step(path) <= _step(newest)][-NUM_KEPT:]

    def _steps(self) -> list[Path]:
        """Whatever has the name of a checkpoint, the newest last."""
        paths = (p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", p.name))
        return sorted(paths, key=_step)

    def complete(self) -> list[Path]:
        """The complete checkpoints, the newest last."""
        return [path for path in self._steps() if (path / run_facts.NAME).is_file()]

    def load(self) -> int:
        """Loads the newest checkpoint that is not damaged; its step, or 0 where there is none.

        Rank 0 prints one line where a newer one is damaged.

        Raises:
            UserError: on every rank, where the checkpoint is of another run, or all are damaged.
        """
        reasons: list[str] = []
        for path in reversed(on_rank_0(self._steps)):
            reason = self._load_from(path)
            if reason is None:
                if reasons:
                    line = f"damaged: {'; '.join(reasons)}: going on from {path.name}"
                    on_rank_0(partial(print, line, flush=True))
                # A kill after a save leaves those before, and a finished run makes no other save.
                on_rank_0(partial(self._remove_before, path))
                return _step(path)
            reasons.append(f"{path} ({one_line(reason)})")
            self.damaged.append(path)
        if reasons:
            raise UserError(
                f"no checkpoint can be loaded: {'; '.join(reasons)}: remove them, or start "
                "without --resume"
            )
        return 0

    def _load_from(self, path: Path) -> str | None:
        """Why the checkpoint cannot be loaded; None where it was, on every rank.

        Where only some ranks have failed, the others have loaded what is not to be used: all ranks
        then load another, or leave.
        """
        checksums = on_rank_0(lambda: run_facts.read(path, _step(path), self.facts))
        if isinstance(checksums, str):
            return checksums
        return _first_failure(lambda: run_facts.compare(path, checksums)) or _first_failure(
            lambda: self.trainer.load(path)
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder, and a run names its checkpoints so: move it away, or use "
            "another --out"
        )


def _first_failure(work: Callable[[], None]) -> str | None:
    """Why `work` failed on the first rank where it did; None where it did on none."""
    reason = None
    try:
        work()
    except (Exception, CheckpointException) as error:
        reason = _reason(error)
    return next((text for text in gather(reason) if text), None)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        causes = [cause for cause, _ in error.failures.values()]
        error = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    if isinstance(error, OSError):
        return describe(error)
    text = str(error).strip() or type(error).__name__
    text = re.sub(r"^\[enforce fail[^\]]*\][ .]*", "", text.splitlines()[0])
    # What torch says where a disk is full; the error of the system does not reach the other ranks.
    return re.sub(r"^unexpected pos \d+ vs \d+$", "a file took fewer bytes than it was given", text)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free in {folder}"
    except OSError as error:
        return describe(error)
