"""Plays cases on the ranks of one process group: a clean step, the faulty one, a clean one."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer

import distclip
from tests.faults import placed
from tests.faults.cases import (
    GIVEN,
    IN_LOSS,
    NOT_FINITE,
    POLICIES,
    UNSHARDED,
    Case,
)
from tests.faults.judge import judge
from tests.faults.losses import given_loss, losses_of
from tests.faults.placed import Placed
from tests.faults.records import Figures, Holding, Record, Step
from tests.support import overlap
from tests.support.wrapped import is_partial, local

SCALE = 1024.0
OTHERS_WAIT = timedelta(seconds=60)
PARTS = (0.5, 0.5, 0.0, 0.0)  # of a `Partial` gradient on each rank; their sum is exact


@cache
def placed_as(layout: str) -> Placed:
    return placed.make(layout)


def forget() -> None:
    """Lets go of the models, where other tests go on with the same ranks."""
    placed_as.cache_clear()


def holding_of(layout: str) -> Holding:
    here = placed_as(layout)
    return Holding(
        torch.cat([*here.elements, torch.zeros(0, dtype=torch.long)]).numpy(),
        np.repeat(range(len(here.elements)), [len(e) for e in here.elements]),
        tuple(name.replace("_fsdp_wrapped_module.", "") for name, _ in here.params),
        tuple(here.partial),
        tuple(here.tensors),
    )


def play(case: Case) -> Record:
    """One case on this rank; all ranks play it together."""
    record, before = Record(), _collectives()
    try:
        # DistributedDataParallel takes one communication hook in its life.
        fresh = case.layout == "ddp" and case.overlap
        here = placed.make(case.layout) if fresh else placed_as(case.layout)
        with overlap.sizes() if case.overlap else contextlib.nullcontext():
            _Player(case, here, record).play()
    except Exception:
        record.crash = traceback.format_exc()
        _wait_for_others(case)
    record.collectives = {n: num - before.get(n, 0) for n, num in _collectives().items()}
    return record


def _wait_for_others(case: Case) -> None:
    """Raises in the place of a case that only this rank cannot play: the others wait in it."""
    store = dist.distributed_c10d._get_default_store()
    names = [f"{case.number} has crashed on {rank}" for rank in range(dist.get_world_size())]
    store.set(names[dist.get_rank()], "")
    store.wait(names, OTHERS_WAIT)


def _collectives() -> dict[str, int]:
    """How many collectives each process group has begun; gloo counts them."""
    world: Any = dist.distributed_c10d._world
    return {world.pg_names[g]: g._get_sequence_number_for_group() for g in world.pg_map}


class _Player:
    def __init__(self, case: Case, here: Placed, record: Record) -> None:
        self.case, self.here, self.record = case, here, record
        self.drawn = np.random.default_rng(case.number)  # the same on every rank
        self.first_weights = self._draw() * 0.5
        here.set_weights(self.first_weights)
        for _, param in here.params:
            param.grad = None
        self.optimizer: Optimizer = here.make_optimizer(case.optimizer)
        self.scaler = _scaler(case) if case.scaled else None
        self.clipper = distclip.Clipper(
            here.source,
            POLICIES[case.policy],
            on_nonfinite=case.mode,
            overlap=case.overlap,
            **here.options,
        )
        self.attached = None
        if case.way == "attach":
            self.attached = self.clipper.attach(self.optimizer, self.scaler)

    def play(self) -> None:
        try:
            for step in range(self.case.faulty + 2):
                self._step(step)
            # A pipeline's stages have tensors of their own.
            saved = self.clipper.state_dict()
            self.record.states = str(saved)
            self.record.losses = losses_of(saved) if self.case.gives_loss else []
        finally:
            if self.attached is not None:
                self.attached.remove()
            for _, param in self.here.params:
                param.grad = None

    def _draw(self) -> Tensor:
        whole = torch.from_numpy(self.drawn.standard_normal(self.here.numel, np.float32))
        whole[0] = 0
        return whole

    def _step(self, step: int) -> None:
        case, here = self.case, self.here
        if case.policy.startswith("AGC"):  # NaN in a weight is a fault of its own
            here.set_weights(self.first_weights)
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self._make_gradients(step)
        if step == case.faulty and case.place not in (IN_LOSS, GIVEN):
            self._break_gradients()
        grads = [p.grad for _, p in here.params]
        before = here.flat(grads)
        weights = here.flat([p for _, p in here.params])
        loss = given_loss(case, step, self._breaks_loss(step)) if case.gives_loss else None
        figures = self._take_step(loss)
        reduced = tuple(
            partial and p.grad is not None and not is_partial(p.grad)
            for partial, (_, p) in zip(here.partial, here.params, strict=True)
        )
        after = here.flat([p.grad for _, p in here.params])
        stepped = here.flat([p for _, p in here.params])
        values = torch.stack([before, after, weights, stepped]).numpy()
        given = None if loss is None else float(loss)
        self.record.steps.append(Step(values, reduced, scale, figures, given))
        for _, param in here.params:
            param.grad = None

    def _make_gradients(self, step: int) -> None:
        """By backward with overlap, else written: growing from step to step."""
        case, here, scaler = self.case, self.here, self.scaler
        if case.overlap and here.backward is not None:
            here.backward(case.number % 50 + step, lambda loss: self._loss(loss, step))
            return
        whole = self._draw() * (1 + step) * self._part(1.0)
        for i, (_, param) in enumerate(here.params):
            if not here.has_gradient[i]:
                continue
            values = whole[here.elements[i]]
            if here.partial[i]:
                values = values * PARTS[dist.get_rank()]
            gradient = here.as_gradient(i, values)
            if case.overlap:
                (local(param) * local(gradient)).sum().backward()
            else:
                param.grad = gradient
        if scaler is not None:
            scaler.scale(torch.ones(()))

    def _part(self, value: float) -> float:
        return value if self.scaler is None else value * self.scaler.get_scale()

    def _loss(self, loss: Tensor, step: int) -> Tensor:
        case = self.case
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self._breaks_loss(step):
            loss = loss * NOT_FINITE.get(case.fault, 1e30)
        return loss

    def _breaks_loss(self, step: int) -> bool:
        """Whether this rank's loss is the wrong one, in backward."""
        everyone = self.case.layout in placed.BATCHES_ALIKE  # they compute one loss together
        is_now = step == self.case.faulty and self.case.place == IN_LOSS
        return is_now and (everyone or dist.get_rank() == self.case.rank)

    def _faulty_elements(self) -> Tensor:
        """The numbers of the elements that are to be broken; only the rank of the case knows."""
        case, here = self.case, self.here
        chosen = torch.zeros(0, dtype=torch.long)
        if dist.get_rank() == case.rank:
            some = [
                e[e > 0] for e, has in zip(here.elements, here.has_gradient, strict=True) if has
            ]
            some = [e for e in some if len(e)]
            if some:
                index = {"first": 0, "middle": len(some) // 2, "last": len(some) - 1}[case.place]
                chosen = some[index]
                if case.fault in (*NOT_FINITE, "large"):
                    chosen = chosen[case.number % len(chosen)].reshape(1)
        return chosen

    def _everywhere(self, elements: Tensor) -> Tensor:
        """The numbers that the rank of the case has chosen, on all ranks."""
        mask = torch.zeros(self.here.numel)
        mask[elements] = 1
        dist.broadcast(mask, self.case.rank)
        return mask.nonzero().flatten()

    def _break_gradients(self) -> None:
        """In place, after backward: those of the copies too where they are no copies otherwise."""
        case, here = self.case, self.here
        elements = self._faulty_elements()
        on_all = case.fault not in NOT_FINITE or case.layout in UNSHARDED
        if on_all:
            elements = self._everywhere(elements)
        for i, (_, param) in enumerate(here.params):
            if param.grad is None:
                continue
            values = local(param.grad)
            if case.fault == "all denormal":
                values.mul_(1e-41)
                continue
            where = torch.isin(here.elements[i], elements).view(values.shape)
            part = 1.0
            if here.partial[i] and case.fault not in NOT_FINITE:
                part = PARTS[dist.get_rank()]
            values[where] = self._faulty_value() * part

    def _faulty_value(self) -> float:
        finite = {"overflow": 3e38, "large": 1e30, "denormal": 1e-40}
        return {**NOT_FINITE, **finite}[self.case.fault]

    def _take_step(self, loss: float | Tensor | None) -> Figures:
        report, error = None, ""
        seen = None if self.attached is None else self.attached.report
        try:
            report = self._clip_and_step(loss)
        except (distclip.NonFiniteGradientError, ValueError) as raised:
            error = type(raised).__name__
        if self.scaler is not None:
            self.scaler.update()
        if report is seen:
            report = None
        left = [
            name
            for name in ("grad_scale", "found_inf")
            if getattr(self.optimizer, name, None) is not None
        ]
        figures = Figures(
            error,
            scale=1.0 if self.scaler is None else self.scaler.get_scale(),
            num_skipped=int(self.clipper.skipped),
            left_behind=tuple(left),
        )
        if report is None:
            return figures
        return figures._replace(
            total_norm=report.total_norm.item(),
            finite=bool(report.finite),
            clipped=bool(report.clipped),
            skipped=bool(report.skipped),
            coefficient=report.coefficient.item(),
            named=report.nonfinite_parameters(),
        )

    def _clip_and_step(self, loss: float | Tensor | None) -> distclip.Report | None:
        clipper, optimizer, scaler = self.clipper, self.optimizer, self.scaler
        if self.case.way == "step":
            return clipper.step(optimizer, scaler, loss=loss)
        if self.attached is not None:
            optimizer.step() if scaler is None else scaler.step(optimizer)
            return self.attached.report
        report = clipper.clip_(optimizer, scaler, loss=loss)
        if scaler is not None:
            scaler.step(optimizer)
        elif not report.skipped:
            optimizer.step()
        return report


def _scaler(case: Case) -> GradScaler:
    """FSDP1's own scaler adds up the overflows of all ranks when it unscales."""
    if case.layout.startswith("fsdp1") or (
        case.hidden_from_scaler and case.layout not in UNSHARDED
    ):
        return ShardedGradScaler(device="cpu", init_scale=SCALE)
    return GradScaler("cpu", init_scale=SCALE)


def play_all(cases: Sequence[Case]) -> list[tuple[int, str]]:
    """The findings of all cases, by number; each rank judges its share of the cases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its wrappers
        records = [play(case) for case in cases]
    holdings = {case.layout: holding_of(case.layout) for case in cases}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (records, holdings))
    found: list[tuple[int, str]] = []
    for i in range(dist.get_rank(), len(cases), dist.get_world_size()):
        case = cases[i]
        ranks = [each[0][i] for each in everyone]
        holds = [each[1][case.layout] for each in everyone]
        found += [(case.number, text) for text in judge(case, ranks, holds)]
    return found
