"""Checkpoints that are whole or not there: written under another name, renamed when all is written.

Two starts of one run may be alive at once, where a node was cut off and the run went on elsewhere.
Each start claims the folder with a token of its own; only the last to claim it may complete a
checkpoint.
"""

import json
import re
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.ranks import UserError, agree, on_rank_0
from launch.trainers import Trainer

NUM_KEPT = 2
FACTS = "run.json"
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
        self.token = on_rank_0(lambda: self._claim(resume))
        agree(self._check_shared)

    def _claim(self, resume: bool) -> str:
        """Removes what a killed run left half-written and, unless resuming, every checkpoint."""
        self.token = uuid.uuid4().hex
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder.with_suffix(f".{self.token}")
            temporary.write_text(self.token)
            temporary.rename(self.folder.with_suffix(OWNER))
            for pattern in ("unfinished-*", "discarded-*", *([] if resume else ["step-*"])):
                for path in self.folder.glob(pattern):
                    self._discard(path)
        except OSError as error:
            out = self.folder.parent
            raise UserError(f"--out {out} cannot be used: {error.strerror}") from None
        return self.token

    def _discard(self, path: Path) -> None:
        # Renamed before it is removed: an earlier start that completes it has all of it, or none.
        renamed = path.with_name(f"discarded-{self.token}-{path.name}")
        try:
            path.rename(renamed)
        except FileNotFoundError:
            return
        shutil.rmtree(renamed, ignore_errors=True)  # a rank that is cut off may still write into it

    def _owned(self) -> bool:
        """Whether no later start has claimed the folder."""
        try:
            return self.folder.with_suffix(OWNER).read_text() == self.token
        except FileNotFoundError:
            return False

    def _check_shared(self) -> None:
        until = time.monotonic() + SECONDS_TO_SHARE
        while not self._owned():
            if time.monotonic() > until:
                raise UserError(
                    f"--out {self.folder.parent}: {socket.gethostname()} does not see there what "
                    "rank 0 wrote: it has to be a folder that all machines share"
                )
            time.sleep(0.1)

    def _check_owned(self) -> None:
        if not self._owned():
            raise UserError(
                f"{self.folder} now belongs to a later start of this run: this one ends and "
                "writes no more"
            )

    def save(self, step: int) -> None:
        """Writes one checkpoint, and removes all but the last two.

        Raises:
            UserError: on every rank, where a later start has claimed the folder.
        """
        temporary = self.folder / f"unfinished-{self.token}-{step}"
        on_rank_0(self._check_owned)
        self.trainer.save(temporary)
        # A name without "unfinished" says that the last rank has written its share.
        dist.barrier()
        on_rank_0(lambda: self._finish(temporary, step))

    def _finish(self, temporary: Path, step: int) -> None:
        try:
            (temporary / FACTS).write_text(json.dumps({"step": step, **self.facts}, indent=1))
            self._check_owned()
            temporary.rename(self.folder / f"step-{step:07d}")
        except FileNotFoundError:  # a later start has discarded it in this moment
            self._check_owned()
            raise
        for old in self.complete()[:-NUM_KEPT]:
            shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """The complete checkpoints, the newest last."""
        paths = (p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", p.name))
        return sorted((p for p in paths if (p / FACTS).is_file()), key=lambda p: int(p.name[5:]))

    def load(self) -> int:
        """Loads the last complete checkpoint; its step, or 0 where there is none.

        Raises:
            UserError: on every rank, where the checkpoint is of another run or damaged.
        """
        path = on_rank_0(lambda: next(reversed(self.complete()), None))
        if path is None:
            return 0
        step = on_rank_0(lambda: self._check_facts(path))
        self.trainer.load(path)
        return step

    def _check_facts(self, path: Path) -> int:
        try:
            saved = json.loads((path / FACTS).read_text())
            step = int(saved["step"])
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"checkpoint {path}: its {FACTS} is damaged; remove that folder"
            ) from None
        for name, value in self.facts.items():
            if saved.get(name) != value:
                raise UserError(
                    f"checkpoint {path} is of a run with {name} {saved.get(name)} and this one has "
                    f"{name} {value}: use the same, or another --out"
                )
        return step
