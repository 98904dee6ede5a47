"""Checkpoints that are whole or not there: written under another name, renamed when every rank is done.

Two starts of one run may live at once, where a node was cut off and the run went on elsewhere. Each start claims the
folder with a token of its own; only the last to claim it may complete a checkpoint.
"""

import json
import re
import shutil
import socket
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import UserError, from_rank_0
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from zero import Zero

KEPT = 2
FACTS = "run.json"
OWNER = ".owner"  # beside the folder of checkpoints
SECONDS_TO_SHARE = 10.0  # network file systems remember for a few seconds that a file was not there


class Training(Stateful):
    """Model and optimizer under names that do not depend on the layout: saved on one, they load on another."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        with warnings.catch_warnings():
            # FSDP1's own code asks for a device in a way that torch calls out of date; the CPU is right.
            warnings.filterwarnings("ignore", message=".*_get_pg_default_device.*|Multiple backends are registered.*")
            model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def claim(folder: Path, *, everything: bool) -> str:
    """Makes `folder` this start's own, and returns its token; for rank 0 alone.

    Removes what a killed run left half-written, or every checkpoint; nothing that has another name.
    """
    token = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_suffix(f".{token}")
    unfinished.write_text(token)
    unfinished.rename(folder.with_suffix(OWNER))
    for pattern in ("unfinished-*", "discarded-*", "step-*") if everything else ("unfinished-*", "discarded-*"):
        for path in folder.glob(pattern):
            _discard(path, token)
    return token


def _discard(path: Path, token: str) -> None:
    """Renames before removing: an earlier start that completes this very checkpoint has it whole, or not at all."""
    out_of_reach = path.with_name(f"discarded-{token}-{path.name}")
    try:
        path.rename(out_of_reach)
    except FileNotFoundError:
        return
    shutil.rmtree(out_of_reach, ignore_errors=True)  # a rank that is cut off may still write into it


def owned(folder: Path, token: str) -> bool:
    """Whether no later start has claimed `folder`."""
    try:
        return folder.with_suffix(OWNER).read_text() == token
    except FileNotFoundError:
        return False


def check_shared(folder: Path, token: str) -> None:
    """Raises UserError where this rank does not see what rank 0 wrote into `folder`."""
    until = time.monotonic() + SECONDS_TO_SHARE
    while not owned(folder, token):
        if time.monotonic() > until:
            raise UserError(
                f"--out {folder.parent}: {socket.gethostname()} does not see there what rank 0 wrote: it has to be a "
                "folder that all machines share"
            )
        time.sleep(0.1)


def save(folder: Path, token: str, step: int, parts: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes one checkpoint below `folder` and removes all but the last two.

    Collective: every rank must call it, at the same step.

    Raises: UserError on every rank, where a later start has claimed the folder.
    """
    temporary = folder / f"unfinished-{token}-{step}"
    from_rank_0(lambda: _check_owned(folder, token))
    dcp.save(_without_zero(parts), checkpoint_id=temporary)
    for part in _zero_of(parts):
        part.save(temporary)
    # The name says that the checkpoint is complete: it may only appear when the last rank has written its part.
    dist.barrier()
    from_rank_0(lambda: _complete(folder, token, step, facts))


def _complete(folder: Path, token: str, step: int, facts: dict[str, Any]) -> None:
    temporary = folder / f"unfinished-{token}-{step}"
    try:
        (temporary / FACTS).write_text(json.dumps({"step": step, **facts}, indent=1))
        _check_owned(folder, token)
        temporary.rename(folder / f"step-{step:07d}")
    except FileNotFoundError:  # a later start has discarded it in this moment
        _check_owned(folder, token)
        raise
    for old in complete(folder)[:-KEPT]:
        shutil.rmtree(old)


def _check_owned(folder: Path, token: str) -> None:
    if not owned(folder, token):
        raise UserError(f"{folder} now belongs to a later start of this run: this one ends and writes no more")


def _zero_of(parts: dict[str, Any]) -> list[Zero]:
    """DeepSpeed's engines, which write files of their own."""
    return [part for part in parts.values() if isinstance(part, Zero)]


def _without_zero(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if not isinstance(part, Zero)}


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, the newest last."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name))
    return sorted((path for path in found if (path / FACTS).is_file()), key=lambda path: int(path.name[5:]))


def load(folder: Path, parts: dict[str, Any], facts: dict[str, Any]) -> int:
    """Fills `parts` from the last complete checkpoint; its step, or 0 where there is none.

    Collective: every rank must call it.

    Raises: UserError on every rank, where the checkpoint is of another run or damaged.
    """
    chosen = from_rank_0(lambda: _chosen(folder, facts))
    if chosen is None:
        return 0
    path, step = chosen
    try:
        for part in _zero_of(parts):
            part.load(path)
        dcp.load(_without_zero(parts), checkpoint_id=path)
    except CheckpointException as error:
        reason = next((str(failure[0]) for failure in error.failures.values()), "no reason given")
        raise UserError(f"checkpoint {path} does not fit this run: {reason.strip().splitlines()[0]}") from None
    return step


def _chosen(folder: Path, facts: dict[str, Any]) -> tuple[Path, int] | None:
    paths = complete(folder)
    if not paths:
        return None
    try:
        saved = json.loads((paths[-1] / FACTS).read_text())
        step = int(saved["step"])
    except (OSError, ValueError, KeyError):
        raise UserError(f"checkpoint {paths[-1]}: its {FACTS} is damaged; remove that folder") from None
    for name, value in facts.items():
        if saved.get(name) != value:
            raise UserError(
                f"checkpoint {paths[-1]} is of a run with {name} {saved.get(name)} and this one has {name} {value}: "
                "use the same, or another --out"
            )
    return paths[-1], step
