"""Trains a small language model with distclip, on any layout and under any policy.

torchrun --standalone --nproc-per-node=2 launch/train.py --out runs/main
torchrun --standalone --nproc-per-node=4 launch/train.py --layout fsdp2+tp --policy clip-norm --policy.max-norm 0.5
python launch/train.py --model lstm --steps 50
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import signals  # before torch, which takes seconds in which a signal would end this rank

# isort: split
import checkpoint
import environment
import layouts
import models
import ranks
import torch
import torch.distributed as dist
from data import Corpus, read_corpus
from metrics import Display, Metrics, Row, summary
from options import HEADS, Options, read_options
from rich.console import Console
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from zero import STAGES, Zero, start_engine

import distclip


@dataclass(frozen=True)
class Run:
    """Everything that a step needs."""

    options: Options[Any]
    device: torch.device
    corpus: Corpus
    wrapped: layouts.Wrapped
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    clipper: distclip.Clipper
    zero: Zero | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds. The data position is the step: batches are a function of (seed, step)."""
        training = self.zero or checkpoint.Training(self.wrapped.model, self.optimizer)
        return {"training": training, "clipper": self.clipper, "scaler": self.scaler}

    @property
    def facts(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to go on as if it had never stopped."""
        names = ("precision", "optimizer", "seed", "batch", "context")
        same = {name: getattr(self.options, name) for name in names}
        data = f"{len(self.corpus.data)} bytes, checksum {self.corpus.checksum:08x}"
        return self.options.shape | same | {"policy": type(self.options.policy).__name__, "data": data}


def main() -> None:
    try:
        environment.settle()
        options = read_options(sys.argv[1:])
        device = ranks.pick_device(options.device)
        ranks.join(device, options.timeout)
        complete = train(options, device)
    except ranks.UserError as error:
        ranks.leave(error)
    dist.destroy_process_group()
    if not complete:
        signals.leave(signals.STOPPED)


def train(options: Options[Any], device: torch.device) -> bool:
    """Trains to the last step, or to the one at which the ranks agreed to stop; whether it was the last."""
    corpus = ranks.agree(lambda: read_corpus(options.data, options.context))
    run = start(options, device, corpus)
    folder = options.out / "checkpoints"
    # torchrun counts restarts for each machine on its own.
    resume = ranks.any_rank(options.resume or environment.restarted())
    token = ranks.from_rank_0(lambda: prepare(options, resume))
    ranks.agree(lambda: checkpoint.check_shared(folder, token))
    done = checkpoint.load(folder, run.parts, run.facts) if resume else 0
    console = Console()
    metrics = Metrics(options.out / "metrics.jsonl", done) if dist.get_rank() == 0 else None
    display = Display(console, done, options.steps) if metrics else None
    if metrics:
        console.print(opening(run, done, resume), highlight=False, soft_wrap=True)
    stop = False
    with display.bar if display else contextlib.nullcontext():
        for step in range(done + 1, options.steps + 1):
            row, stop = train_step(run, step)
            if metrics and display:
                metrics.append(row)
                display.show(row, metrics.num_clipped)
            due = options.save_every and (step % options.save_every == 0 or step == options.steps)
            stop = stop and step < options.steps
            if due or stop:
                checkpoint.save(folder, token, step, run.parts, run.facts)
            if stop:
                break
    if run.zero is not None:
        run.zero.engine.destroy()
    if metrics and stop:
        console.print(f"asked to stop: checkpoint of step {step} is complete, and --resume goes on", soft_wrap=True)
    elif metrics:
        finish(run, metrics.rows, console)
    return not stop


def start(options: Options[Any], device: torch.device, corpus: Corpus) -> Run:
    """Model, optimizer and clipper.

    Collective: every rank must call it.
    """
    model = models.build(**options.shape, heads=HEADS, precision=options.precision, seed=options.seed)
    wrapped = layouts.wrap(model, options.layout, options.precision, device)
    params = list(wrapped.model.parameters())
    kinds = {isinstance(param, DTensor) for param in params}
    # A foreach kernel refuses DTensors beside plain tensors (an LSTM under tp has both).
    settings: dict[str, Any] = {"lr": options.lr, "foreach": False if len(kinds) > 1 else None}
    if options.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), **settings)
    else:
        optimizer = torch.optim.SGD(params, **settings)
    if options.layout in STAGES:
        return start_zero(options, device, corpus, wrapped, optimizer)
    # FSDP1's flat shards are plain tensors: only its own scaler knows that an overflow on one rank is everybody's.
    scaler_type = ShardedGradScaler if options.layout == "fsdp1" else GradScaler
    scaler = scaler_type(device.type, enabled=options.precision == "fp16")
    clipper = make_clipper(wrapped.model, options.policy)
    return Run(options, device, corpus, wrapped, optimizer, scaler, clipper)


def start_zero(
    options: Options[Any],
    device: torch.device,
    corpus: Corpus,
    whole: layouts.Wrapped,
    optimizer: torch.optim.Optimizer,
) -> Run:
    made = start_engine(whole.model, optimizer, options, device)
    wrapped = dataclasses.replace(whole, model=made.engine)
    scaler = GradScaler(device.type, enabled=False)  # the engine has its own
    return Run(options, device, corpus, wrapped, made.optimizer, scaler, made.clipper, made)


def make_clipper(model: torch.nn.Module, policy: Any) -> distclip.Clipper:
    try:
        return distclip.Clipper(model, policy)
    except ValueError as error:  # an --policy.exclude that matches nothing
        raise ranks.UserError(str(error)) from None


def prepare(options: Options[Any], resume: bool) -> str:
    """Claims the output folder: without what a killed run left half-written and, unless resuming, an earlier run."""
    try:
        return checkpoint.claim(options.out / "checkpoints", everything=not resume)
    except OSError as error:
        raise ranks.UserError(f"--out {options.out} cannot be used: {error.strerror}") from None


def train_step(run: Run, step: int) -> tuple[Row, bool]:
    """One step of training: what happened, as plain numbers, and whether the ranks stop after it.

    Collective: every rank must call it. Reading the numbers is the step's one wait for the device.
    """
    began = time.perf_counter()
    lr = learning_rate(run.options, step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    inputs, targets = local_batch(run, step)
    with run.wrapped.autocast():
        logits = run.wrapped.model(inputs)
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    report = update(run, loss)
    mean, stop = over_ranks(loss, signals.warned())
    row = {"step": step, "loss": mean} | measured(report)
    tokens = run.options.batch * run.options.context
    return row | {"lr": lr, "seconds": round(time.perf_counter() - began, 4), "tokens": tokens}, stop


def update(run: Run, loss: torch.Tensor) -> distclip.Report:
    if run.zero is not None:
        return run.zero.update(loss)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    report = run.clipper.clip_()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return report


def learning_rate(options: Options[Any], step: int) -> float:
    """A straight line up over the warm-up, then half a cosine down to a tenth."""
    if step <= options.warmup:
        return options.lr * step / options.warmup
    part = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * part))


def local_batch(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the step's batch: equal on the ranks of a tp axis, different along the others."""
    options, wrapped = run.options, run.wrapped
    batch = run.corpus.batch(options.seed, step, options.batch, options.context)
    share = batch.chunk(wrapped.num_data_ranks)[wrapped.data_rank].to(run.device)
    return share[:, :-1].contiguous(), share[:, 1:].contiguous()


def over_ranks(loss: torch.Tensor, warned: bool) -> tuple[float, bool]:
    """The mean loss, and whether any rank was asked to stop: one collective, so that all stop at the same step."""
    # Over all ranks and not only the data ranks: along a tp axis all hold the same loss, and the mean stays what it is.
    both = torch.stack([loss.detach(), loss.new_tensor(warned)])
    dist.all_reduce(both)
    total, num_warned = both.tolist()
    return total / dist.get_world_size(), num_warned > 0


def measured(report: distclip.Report) -> Row:
    values = report.to_dict()
    return {name: values[name] for name in ("total_norm", "limit", "coefficient", "clipped", "finite")}


def opening(run: Run, done: int, resume: bool) -> str:
    corpus = run.corpus
    size = f"{len(corpus.data) / 1e6:.1f} MB from {corpus.num_files} files of {corpus.source}"
    if done:
        return f"{describe(run)}: going on after step {done}, on {size}"
    missing = "nothing to resume in --out, " if resume else ""
    return f"{describe(run)}: {missing}starting at step 1, on {size}"


def describe(run: Run) -> str:
    options = run.options
    where = f"{dist.get_world_size()} x {run.device.type}, {options.precision}"
    settings = ", ".join(
        f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}"
        for name, value in vars(options.policy).items()
    )
    return f"{options.model}, {options.layout} on {where}, {options.policy_name} ({settings})"


def finish(run: Run, rows: list[Row], console: Console) -> None:
    """The picture, the table, and where everything is."""
    import plots  # matplotlib takes a second, which the other ranks and a mistaken option need not wait for

    out: Path = run.options.out
    plots.report(rows, describe(run), out / "report.png")
    console.print(summary(rows, describe(run)))
    for name in ("report.png", "metrics.jsonl", "checkpoints"):
        console.print(f"  {os.fspath(out / name)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
