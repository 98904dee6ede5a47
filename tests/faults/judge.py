"""Compares what happened on four ranks with what the oracle says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from distclip import Scope
from tests.faults import oracle
from tests.faults.candidates import candidates_of
from tests.faults.cases import GIVEN, NOT_FINITE, PIPELINE, POLICIES, UNSHARDED, Case
from tests.faults.expected import Expected, expected
from tests.faults.optimizers import Optimizer
from tests.faults.oracle import Verdict
from tests.faults.records import Figures, Holding, Record, Step

LEAST = 2e-45  # what a product that float32 holds as a denormal number may be off
NEAR = 3e-7  # three roundings to float32
WAITING = ("ZClip", "AutoClip", "AGGC", "AGGC, raises", "SkipSpike", "SkipSpike, loss")


def judge(case: Case, records: Sequence[Record], holdings: Sequence[Holding]) -> list[str]:
    """What went wrong, in words; empty where nothing did."""
    if crashes := [f"rank {i}: {r.crash}" for i, r in enumerate(records) if r.crash]:
        return [f"{case}\n" + "\n".join(crashes)]
    with np.errstate(all="ignore"):  # infinities and NaN are what this is about
        found = list(_Judge(case, holdings).findings(records))
    if odd := odd_groups(records):
        found.append(f"the ranks of a group made different numbers of collectives: {odd}")
    alone = case.layout == PIPELINE and POLICIES[case.policy].scope is not Scope.MODEL
    if not alone and len({record.states for record in records}) > 1:
        found.append("the policies' states differ between ranks")
    return [f"{case}\n  {text}" for text in found]


def odd_groups(records: Sequence[Record]) -> dict[str, list[int]]:
    """One collective too many is taken for another one later, or waits for ever."""
    counts: dict[str, list[int]] = {}
    for record in records:
        for name, num in record.collectives.items():
            counts.setdefault(name, []).append(num)
    return {name: nums for name, nums in counts.items() if len({*nums}) > 1}


class _Judge:
    def __init__(self, case: Case, holdings: Sequence[Holding]) -> None:
        self.case, self.holdings = case, holdings
        self.policy = POLICIES[case.policy]
        self.tensors = holdings[0].tensors
        self.numel = self.tensors[-1].first + self.tensors[-1].shape.numel()
        groups = oracle.groups_of(self.policy, [each.shape for each in self.tensors])
        self.group_of = np.concatenate([[0], groups.numpy()])  # padding is zero anyway
        self.past = oracle.no_past()
        self.num_skipped = 0
        self.optimizers = [Optimizer(case.optimizer) for _ in holdings]

    def findings(self, records: Sequence[Record]) -> Iterator[str]:
        for number in range(len(records[0].steps)):
            steps = [record.steps[number] for record in records]
            for text in self._step(steps):
                yield f"step {number}: {text}"
            if number == self.case.faulty and not self._is_faulty(steps):
                yield "there is no fault"
        for rank, record in enumerate(records):
            found, right = record.losses, self.past.losses
            if len(found) != len(right) or not np.allclose(found, right, 1e-12):
                yield f"rank {rank} remembers the losses {found}, not {right}"

    def _is_faulty(self, steps: Sequence[Step]) -> bool:
        if self.case.place == GIVEN:
            return not all(step.loss is None or abs(step.loss) < 100 for step in steps)
        has_any = bool((self.holdings[self.case.rank].elements > 0).any())
        broken = any(not np.isfinite(step.values[0]).all() for step in steps)
        return broken or not has_any or self.case.fault not in NOT_FINITE

    def _whole(self, steps: Sequence[Step], row: int, finite_prevails: bool = False) -> Any:
        """The values of all ranks put together. Where copies differ, NaN prevails, then infinity;
        or the number that is finite.
        """
        whole, sums = np.zeros(self.numel, np.float32), np.zeros(self.numel)
        known = np.zeros(self.numel, bool)
        for step, held in zip(steps, self.holdings, strict=True):
            values = step.values[row]
            is_part = self._is_partial(held) & (row == 0)
            np.add.at(sums, held.elements[is_part], values[is_part].astype(np.float64))
            at, values = held.elements[~is_part], values[~is_part]
            keeps = known[at] & ~np.isfinite(whole[at]) & ~np.isnan(values)
            if finite_prevails:
                keeps = known[at] & ~np.isfinite(values)
            whole[at] = np.where(keeps, whole[at], values)
            known[at] = True
        whole += sums.astype(np.float32)
        whole[0] = 0
        return whole

    def _is_partial(self, held: Holding) -> Any:
        return np.asarray(held.partial, bool)[held.parameter]

    def _step(self, steps: Sequence[Step]) -> Iterator[str]:
        case, scale = self.case, steps[0].scale
        whole, weights = self._whole(steps, 0), self._whole(steps, 2)
        clean = self._whole(steps, 0, finite_prevails=True)
        if case.hidden_from_scaler:
            whole, clean, scale = whole * np.float32(1 / scale), clean * np.float32(1 / scale), 1.0
        weights = self._tensors(weights.astype(np.float64))
        grads, others = (self._tensors(w.astype(np.float64) / scale) for w in (whole, clean))
        losses = [step.loss for step in steps if step.loss is not None]
        verdict = oracle.judge(self.policy, grads, weights, self.past, losses)
        verdicts = [verdict]
        if not _same(whole, clean).all() and self.policy.scope is not Scope.MODEL:
            # One copy is not finite: a rank that holds another one knows only the total norm.
            verdicts.append(oracle.judge(self.policy, others, weights, self.past, losses))
        if not self.past.totals and not self._clips_at_once(verdict, whole / scale):
            yield "nothing is clipped"
        want = expected(case, verdict, bool(np.isfinite(whole).all()))
        self.num_skipped += want.counts
        yield from self._figures(steps, verdict, want)
        yield from self._gradients(steps, verdicts, want, whole, scale)
        yield from self._weights(steps, want)
        if want.reports:
            oracle.remember(verdict, grads, self.past)

    def _clips_at_once(self, verdict: Verdict, whole: Any) -> bool:
        """Whether the first step is clipped; policies that compare with past norms need others."""
        waits = self.case.policy in WAITING
        is_above = verdict.bound is not None and np.abs(whole).max() > verdict.bound
        return waits or is_above or bool((verdict.factors < 1).any())

    def _tensors(self, whole: Any) -> list[torch.Tensor]:
        flat = torch.from_numpy(whole)
        return [flat[t.first : t.first + t.shape.numel()].view(t.shape) for t in self.tensors]

    # --- what the ranks were told ---

    def _figures(self, steps: Sequence[Step], verdict: Verdict, want: Expected) -> Iterator[str]:
        first, is_whole = steps[0].figures, self.policy.scope is Scope.MODEL
        for rank, figures in enumerate(step.figures for step in steps):
            same = figures._replace(named=first.named)
            if not is_whole:  # the coefficient is the smallest one on the rank
                same = same._replace(coefficient=first.coefficient, clipped=first.clipped)
            if repr(same) != repr(first):
                yield f"rank {rank} was told {figures}, rank 0 {first}"
        if first.error != want.error:
            yield f"error {first.error!r}, not {want.error!r}"
        if (first.total_norm is not None) != want.reports:
            yield f"a report: {first.total_norm is not None}, not {want.reports}"
        if first.left_behind:
            yield f"the optimizer still has {first.left_behind}"
        if first.num_skipped != self.num_skipped:
            yield f"{first.num_skipped} steps skipped, not {self.num_skipped}"
        scale = steps[0].scale * (0.5 if want.halves else 1.0)
        if first.scale != scale:
            yield f"the loss scale becomes {first.scale}, not {scale}"
        if first.total_norm is not None and want.reports:
            yield from self._norm_and_coefficient(first, verdict, want)
            yield from self._names(steps, verdict)

    def _norm_and_coefficient(
        self, first: Figures, verdict: Verdict, want: Expected
    ) -> Iterator[str]:
        total = float(np.float32(verdict.total))
        if not np.isclose(first.total_norm, total, 1.2e-7, LEAST, equal_nan=True):
            yield f"norm {first.total_norm!r}, not {total!r}"
        if (first.finite, first.skipped) != (verdict.finite, want.skipped):
            yield f"finite, skipped: {first.finite, first.skipped}, not {verdict}"
        if self.policy.scope is Scope.MODEL:
            factor = float(verdict.factors[0])
            factor = 1.0 if want.untouched else 0.0 if want.zeros else factor
            if not np.isclose(first.coefficient, factor, 2e-7, LEAST, equal_nan=True):
                yield f"coefficient {first.coefficient!r}, not {factor!r}"
            if first.clipped != (first.coefficient < 1):
                yield f"clipped is {first.clipped} with coefficient {first.coefficient}"

    def _names(self, steps: Sequence[Step], verdict: Verdict) -> Iterator[str]:
        """Of tensors where they have limits, else of parameters, each with the ranks that have it
        so.
        """
        right: dict[str, list[int]] = {}
        for rank, (step, held) in enumerate(zip(steps, self.holdings, strict=True)):
            broken = ~np.isfinite(step.values[0])
            if self.policy.scope in (Scope.MODEL, Scope.ELEMENT):
                names = {held.names[i] for i in held.parameter[broken]}
            else:
                firsts = [tensor.first for tensor in self.tensors]
                indices = np.searchsorted(firsts, held.elements[broken], side="right") - 1
                names = {self.tensors[i].name for i in indices}
            for name in names:
                right.setdefault(name, []).append(rank)
        for rank, step in enumerate(steps):
            named = step.figures.named or {}
            if self.case.layout in UNSHARDED:  # no rank asks the others
                right = {name: [rank] for name in right}
            if any(map(any, (held.partial for held in self.holdings))):  # reduced to all ranks
                named = {name: right.get(name, []) for name in named}
            if named != ({} if verdict.finite else right):
                yield f"rank {rank}: not finite were said to be {named}, not {right}"

    # --- what they hold ---

    def _base(self, step: Step, held: Holding, whole: Any) -> Any:
        """The gradients of a rank before clipping: of the ranks' sum where that was reduced."""
        base = step.values[0]
        if self.case.hidden_from_scaler:
            base = base * np.float32(1 / step.scale)
        reduced = np.asarray(step.reduced, bool)[held.parameter]
        return np.where(reduced, whole[held.elements], base)

    def _gradients(
        self,
        steps: Sequence[Step],
        verdicts: Sequence[Verdict],
        want: Expected,
        whole: Any,
        scale: float,
    ) -> Iterator[str]:
        """Bit for bit: they stay as they were, or one float32 factor explains a whole group."""
        afters = [step.values[1] for step in steps]
        bases = [self._base(s, h, whole) for s, h in zip(steps, self.holdings, strict=True)]
        slacks = [self._slack(held, whole) for held in self.holdings]
        each = zip(afters, bases, slacks, strict=True)
        stay = [_same(a, b) | (np.abs(a - b) <= slack) for a, b, slack in each]
        if want.untouched or (want.may_stay and all(each.all() for each in stay)):
            if not all(each.all() for each in stay):
                yield f"gradients should have stayed as they were{_where(afters, bases)}"
        elif want.zeros:
            if any(after.any() for after in afters):
                yield "gradients should have become zero"
        else:
            yield from self._clips(afters, bases, slacks, verdicts, scale)

    def _slack(self, held: Holding, whole: Any) -> Any:
        """How far gradients may be off: of sums over ranks, which may round in another order."""
        sums = self._is_partial(held) & self.case.overlap
        sizes = np.abs(whole[np.isfinite(whole)])
        return np.where(sums, 1e-6 * sizes.max(initial=0), 0.0)

    def _clips(
        self,
        afters: Sequence[Any],
        bases: Sequence[Any],
        slacks: Sequence[Any],
        verdicts: Sequence[Verdict],
        scale: float,
    ) -> Iterator[str]:
        num = len(verdicts[0].factors)
        folds = self.case.fused and self.case.way != "clip_"
        by_verdict = [list(candidates_of(verdict, scale, folds)) for verdict in verdicts]
        each = [candidate for some in by_verdict for candidate in some]
        rights = [candidate for some in by_verdict for candidate in some[: 1 + folds]]
        explained = np.ones((len(each), len(afters), num), bool)
        for rank, (after, base, held) in enumerate(zip(afters, bases, self.holdings, strict=True)):
            slack, groups = slacks[rank], self.group_of[held.elements]
            ignored = (slack > 0) | (held.elements == 0)
            for i, candidate in enumerate(each):
                right = candidate(base, groups)
                explained[i, rank, groups[~_same(after, right) & ~ignored]] = False
            near = held.elements == 0
            for right in (candidate(base, groups) for candidate in rights):
                near |= np.isclose(after, right, NEAR, LEAST + slack / scale, equal_nan=True)
            if not near.all():
                i = int(np.argmin(near))
                right = rights[0](base, groups)
                yield (
                    f"rank {rank}, element {held.elements[i]}: {base[i]!r} became {after[i]!r}, "
                    f"not {right[i]!r}"
                )
        together = explained.all(1) if len(verdicts) == 1 else explained
        if not (is_one := together.any(0)).all():
            group = int(np.argwhere(~is_one)[0][-1])
            yield f"no one factor explains the gradients of group {group}: some are half scaled"

    def _weights(self, steps: Sequence[Step], want: Expected) -> Iterator[str]:
        """The step itself, with the gradients that were found right."""
        for rank, (step, held) in enumerate(zip(steps, self.holdings, strict=True)):
            _, grads, before, after = step.values
            if not want.stepped:
                if not _same(before, after).all():
                    where = _where([after], [before])
                    yield f"rank {rank}: the step should have been left out{where}"
                continue
            right, off = self.optimizers[rank].step(before, grads.astype(np.float64))
            near = (np.abs(after - right) <= off) | _same(after, right) | (held.elements == 0)
            if not near.all():
                i = int(np.argmin(near))
                yield (
                    f"rank {rank}, element {held.elements[i]}: the weight {before[i]!r} became "
                    f"{after[i]!r}, not {right[i]!r} (gradient {grads[i]!r})"
                )


def _same(a: Any, b: Any) -> Any:
    """Bit for bit, except for the signs of zeros and the bits of NaN."""
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _where(found: Sequence[Any], right: Sequence[Any]) -> str:
    for rank, (a, b) in enumerate(zip(found, right, strict=True)):
        if not (same := _same(a, b)).all():
            i = int(np.argmin(same))
            return f": {b[i]!r} became {a[i]!r} (list {rank}, place {i})"
    return ""
