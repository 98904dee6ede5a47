"""Trains a small language model with distclip, with any layout and any policy.

    python -m launch.train --model lstm --steps 50
    torchrun --standalone --nproc-per-node=2 -m launch.train --layout fsdp2 --out runs/main
    torchrun --standalone --nproc-per-node=2 -m launch.train --policy clip-norm --policy.max-norm 2

The training itself is `train_step` below; the clipping is in `launch.trainers`.
"""

from launch import signals

if __name__ == "__main__":
    # Importing torch takes seconds in which either signal would end this rank.
    signals.install()

import gc
import math
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from distclip import History
from distclip.monitoring.lines import FILE_NAME
from distclip.monitoring.picture import draw
from distclip.monitoring.records import HistoryError, read_run
from launch import ranks, report
from launch.checkpoint import Checkpoints
from launch.files import errors_as, sync
from launch.layouts import Wrapped, wrap
from launch.options import Options, read_options
from launch.task import Corpus, build_model, read_corpus
from launch.trainers import Trainer, make_trainer


@dataclass(frozen=True)
class Run:
    """Everything that a step needs."""

    options: Options[Any]
    device: torch.device
    corpus: Corpus
    wrapped: Wrapped
    trainer: Trainer

    @property
    def facts(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to go on as if it had never stopped."""
        names = ("precision", "optimizer", "seed", "batch", "context")
        same = {name: getattr(self.options, name) for name in names}
        data = f"{len(self.corpus.data)} bytes, checksum {self.corpus.checksum:08x}"
        policy = type(self.options.policy).__name__
        return self.options.shape | same | {"policy": policy, "data": data}


def main() -> None:
    try:
        ranks.read_environment()
        options = read_options(sys.argv[1:])
        device = ranks.pick_device(options.device)
        ranks.join(device, options.timeout)
        finished = train(options, device)
    except ranks.UserError as error:
        ranks.leave(error)
    # Modules and hooks form cycles that hold meshes, and a mesh holds its process groups. One that
    # Python frees at its very end may abort ("terminate called without an active exception"), and
    # torch's own caches of DTensor layouts keep some until then.
    gc.collect()
    dist.destroy_process_group()
    signals.leave(0 if finished else signals.STOPPED)


def train(options: Options[Any], device: torch.device) -> bool:
    """Trains to the last step, or to the one after which the ranks agreed to stop.

    Returns: whether it was the last step.

    Collective: every rank must call it.
    """
    corpus = ranks.agree(lambda: read_corpus(options.data, options.context))
    run = start(options, device, corpus)
    # torchrun counts the restarts of each machine separately.
    resume = any(ranks.gather(options.resume or ranks.restarted()))
    folder = options.out / "checkpoints"
    checkpoints = Checkpoints(folder, run.trainer, run.facts, resume=resume)
    done = checkpoints.load() if resume else 0
    history = ranks.agree(lambda: open_history(options.out, done))
    console = Console(quiet=dist.get_rank() != 0)
    report.show(console, opening(run, done, resume))
    step = run_steps(run, checkpoints, history, report.StepProgress(console, done, options.steps))
    run.trainer.close()
    ranks.on_rank_0(lambda: finish(run, step, history.path, console))
    return step >= options.steps


def start(options: Options[Any], device: torch.device, corpus: Corpus) -> Run:
    """The model, spread over the ranks, and what updates it.

    Collective: every rank must call it.
    """
    model = build_model(**options.shape, precision=options.precision, seed=options.seed)
    wrapped = wrap(model, options.layout, options.precision, device)
    trainer = make_trainer(wrapped.model, options, device)
    return Run(options, device, corpus, wrapped, trainer)


def run_steps(
    run: Run, checkpoints: Checkpoints, history: History, progress: report.StepProgress
) -> int:
    """The steps after the loaded checkpoint, with their own ones; the last step that was made."""
    options, step = run.options, progress.done
    check = partial(check_written, history)
    with history, progress:
        for step in range(progress.done + 1, options.steps + 1):
            stop, failed = train_step(run, step, history, progress)
            if failed:
                break
            last = step == options.steps
            due = options.save_every and (step % options.save_every == 0 or last)
            stop = stop and not last
            if due or stop:
                ranks.agree(check)  # a checkpoint covers the rows of its steps
                checkpoints.save(step)
            if stop:
                break
        ranks.agree(check)
    return step


def train_step(
    run: Run, step: int, history: History, progress: report.StepProgress
) -> tuple[bool, bool]:
    """One step of training, and its row: whether the ranks stop after it, and whether the rows
    before could not be written.

    Reading the loss is the step's one wait for the device.

    Collective: every rank must call it.
    """
    began = time.perf_counter()
    lr = learning_rate(run.options, step)
    for group in run.trainer.optimizer.param_groups:
        group["lr"] = lr
    inputs, targets = local_batch(run, step)
    with run.wrapped.autocast:
        logits = run.trainer.model(inputs)
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    clipped = run.trainer.update(loss)
    mean, (stop, failed) = over_ranks(loss, signals.warned(), history.failure is not None)
    values = {"loss": mean, "lr": lr, "seconds": round(time.perf_counter() - began, 4)}
    values |= {"tokens": run.options.batch * run.options.context}
    causes = clipped.nonfinite_parameters()
    history.append(clipped, step, nonfinite_parameters=causes, **values)
    progress.show(step, mean, clipped)
    return stop, failed


def learning_rate(options: Options[Any], step: int) -> float:
    """A straight line up over the warm-up, then half a cosine down to a tenth."""
    if step <= options.warmup:
        return options.lr * step / options.warmup
    fraction = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * fraction))


def local_batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch: equal along a tp axis, different along the others.

    Shapes: inputs and targets are [local batch, context], int64.
    """
    options, wrapped = run.options, run.wrapped
    batch = run.corpus.batch(options.seed, step, options.batch, options.context, options.corrupt)
    share = batch.chunk(wrapped.num_data_ranks)[wrapped.data_rank].to(run.device)
    return share[:, :-1].contiguous(), share[:, 1:].contiguous()


def over_ranks(loss: Tensor, *flags: bool) -> tuple[float, list[bool]]:
    """The mean loss, and of each flag whether it is set on any rank.

    One collective tells all: the ranks then stop after the same step.
    """
    # The ranks along a tp axis hold the same loss, which leaves the mean over all ranks right.
    sums = torch.cat([loss.detach().view(1), loss.new_tensor(flags)])
    dist.all_reduce(sums)
    total, *counts = sums.tolist()
    return total / dist.get_world_size(), [count > 0 for count in counts]


def open_history(folder: Path, done: int) -> History:
    """Rows after the step `done` are those of a start that was killed: readers leave them out."""
    path = folder / FILE_NAME
    # A run does not go on without its rows: `check_written` says why, in one line.
    warnings.filterwarnings("ignore", f"{re.escape(str(path))} .*Training goes on", UserWarning)
    try:
        with errors_as(f"{path} cannot be used"):
            return History(folder, after=done)
    except ValueError as error:
        raise ranks.UserError(str(error)) from None


def check_written(history: History) -> None:
    """Puts the rows so far on the disk. Raises UserError where one could not be written."""
    history.flush()
    if history.failure:
        raise ranks.UserError(history.failure)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with errors_as(f"{history.path} cannot be written"):
            sync(history.path)


def opening(run: Run, done: int, resume: bool) -> str:
    corpus = run.corpus
    text = f"{len(corpus.data) / 1e6:.1f} MB from {corpus.num_files} files of {corpus.source}"
    if done:
        return f"{describe(run)}: going on after step {done}, on {text}"
    missing = "nothing to resume in --out, " if resume else ""
    return f"{describe(run)}: {missing}starting at step 1, on {text}"


def describe(run: Run) -> str:
    options = run.options
    settings = ", ".join(
        f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}"
        for name, value in vars(options.policy).items()
    )
    where = f"{options.layout} on {dist.get_world_size()} x {run.device.type}, {options.precision}"
    return f"{options.model}, {where}, {options.policy_name} ({settings})"


def finish(run: Run, step: int, path: Path, console: Console) -> None:
    """The picture, the table, and where everything is; or how a run that was stopped goes on."""
    if step < run.options.steps:
        line = f"asked to stop: checkpoint of step {step} is complete, and --resume goes on"
        return report.show(console, line)
    title = describe(run)
    try:
        rows = read_run(path)
    except HistoryError as error:  # a finished run was resumed, and the file is gone
        return report.show(console, f"{error}: nothing to draw")
    picture = run.options.out / "report.png"
    with errors_as(f"{picture} cannot be written"):
        draw([rows], picture, title)
    console.print(report.summary(rows, title))
    for each in (picture, path, run.options.out / "checkpoints"):
        report.show(console, f"  {os.fspath(each)}")


if __name__ == "__main__":
    main()
