"""`parity`: the same model and steps, whole in one process and sharded on ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distclip.arguments import as_flag
from distclip.parity import checks
from distclip.parity.clips import Clip, ClipFunction, Definer, total_norm
from distclip.parity.comparison import Cell, Outcome, compare, nonfinite_cell
from distclip.parity.pieces import Gradients, Piece, assemble
from distclip.parity.pool import START_S, Answer, PerRank, Pool, outcomes_by_rank
from distclip.parity.report import ParityReport
from distclip.parity.whole import Build, Step, Whole, run_whole
from distclip.parity.worker import INVALID, Task
from distclip.policies import Policy


class Round(NamedTuple):
    """One step that is clipped.

    Attributes:
        step: the index of the step function.
        of_norm: the limit, as a multiple of the whole model's norm.
        nonfinite: whether the last rank's loss is NaN.
    """

    name: str
    step: int
    of_norm: float
    nonfinite: bool = False


def parity(
    build: Build,
    step: Step | Sequence[Step],
    layouts: Mapping[str, Callable[[Any], Any]],
    clips: Mapping[str, ClipFunction | Policy[Any] | Clip] | None = None,
    *,
    world_size: int = 2,
    whole_step: Step | Sequence[Step] | None = None,
    gradients: Gradients | None = None,
    max_norm: float | None = None,
    scale: float = 1.0,
    nonfinite: bool = True,
    dtype: torch.dtype | None = None,
    timeout_s: float = 60.0,
    seed: int = 0,
    start_method: str = "spawn",
) -> ParityReport:
    """Compares clipping on ranks with one process in float64, for each layout and each clip.

    The ranks are processes on this machine that communicate by gloo. Every function is sent to
    them, and must be one of a module that they can import.

    For each step the gradients before clipping are compared with those of the whole model in
    float64; the norm, the coefficient and the clipped gradients with what the definition makes of
    the same gradients; the copies of a gradient with each other, by their bits. Then the first step
    runs again with a limit that clips nothing, and once more with a NaN on the last rank, which all
    ranks must notice. A clip that raises or hangs is a row of the table.

    Args:
        build: `() -> nn.Module`, whole and on the CPU. It is called in this process and on every
            rank, each time with the same seed, and must make the same weights.
        step: `(model, rank, world_size) -> loss` of this rank's share of the batch, or None if it
            has called backward. The right gradient is the mean over the ranks: with the same batch
            on all of them (tensor parallelism) it is that of the batch. In the float64 run the
            inputs of `model` are converted. A sequence of functions: one after the other, with the
            same weights, for policies that remember.
        layouts: by name, `model -> sharded model`, called on every rank; also data parallelism. It
            may return another object that `step` and the clips understand, with `gradients`.
        clips: by name, `(model, max_norm) -> total norm` or None; a policy of distclip; or a
            `Clip`, which also says what is right. By default `distclip.clip_grad_norm_`, and
            torch's own function (that of FSDP1 for an FSDP1 model).
        world_size: how many ranks.
        whole_step: `step` for the whole model, if `step` needs the sharded one.
        gradients: `model -> {name: whole gradient, or None}`, called on every rank, for frameworks
            that keep gradients elsewhere. By default they are read from the parameters: plain, DDP,
            FSDP1, FSDP2, DTensors.
        max_norm: the limit. By default half of each step's norm: every step is clipped.
        scale: a loss scale that the gradients carry until the clip removes it.
        nonfinite: whether to run the step with a NaN.
        dtype: that the ranks compute in, where it is less precise than their gradients show, as
            under mixed precision: tolerances follow the least precise.
        timeout_s: how long a clip may take before it counts as hanging.
        seed: of `build` and, with the number of the step, of each step.
        start_method: "spawn", or "forkserver", which imports torch once for all ranks.

    Raises:
        ValueError, TypeError: an argument cannot be used; `build` makes no module, or other weights
            on a rank; a step leaves no gradients; a layout returns None; `max_norm` clips nothing.
        RuntimeError: the ranks cannot be started.
        Whatever `build` and `step` raise in the float64 run.

    Collective: none; call it in one process, below `if __name__ == "__main__":` in a script.
    """
    size = checks.as_whole_number("world_size", world_size, least=1)
    checks.check_sendable("build", build, "() -> nn.Module")
    steps = checks.as_steps(step)
    whole_steps = steps if whole_step is None else checks.as_steps(whole_step)
    if len(whole_steps) != len(steps):
        raise ValueError(
            f"cannot compare {len(steps)} steps with {len(whole_steps)} of the whole model. Pass "
            f"as many functions in `whole_step` as in `step`."
        )
    if gradients is not None:
        checks.check_sendable("gradients", gradients, "model -> {name: whole gradient}")
    checks.check_dtype(dtype)
    checks.check_start_method(start_method)
    kit = _Kit(
        Task(build, None, steps, None, gradients, checks.as_whole_number("seed", seed, least=0)),
        None if max_norm is None else checks.as_positive("max_norm", max_norm),
        checks.as_positive("scale", scale),
        as_flag("nonfinite", nonfinite),
        dtype,
        checks.as_positive("timeout_s", timeout_s),
        Pool(size, start_method),
    )
    named_layouts, named_clips = checks.as_layouts(layouts), checks.as_clips(clips)
    kit.whole = run_whole(build, whole_steps, size, seed)
    kit.check_limit()
    try:
        outcomes = [
            outcome
            for layout in named_layouts.items()
            for clip in named_clips.items()
            for outcome in kit.run(layout, clip)
        ]
    finally:
        kit.pool.stop()
    return ParityReport(tuple(outcomes), size, f"; torch {torch.__version__}")


class _Kit:
    def __init__(
        self,
        task: Task,
        max_norm: float | None,
        scale: float,
        nonfinite: bool,
        dtype: torch.dtype | None,
        timeout_s: float,
        pool: Pool,
    ) -> None:
        self.task, self.max_norm, self.scale, self.dtype = task, max_norm, scale, dtype
        self.nonfinite, self.timeout_s, self.pool = nonfinite, timeout_s, pool
        self.whole = Whole([], {}, "")

    def check_limit(self) -> None:
        if self.max_norm is None:
            return
        norms = [total_norm(gradients) for gradients in self.whole.gradients]
        if max(norms) <= self.max_norm:
            raise ValueError(
                f"cannot compare clipping with max_norm={self.max_norm}: the largest norm of a "
                f"step is {max(norms):.6g}, and nothing would be clipped. Pass a smaller max_norm, "
                f"or None for half of each norm."
            )

    def run(self, layout: tuple[str, Any], clip: tuple[str, Clip]) -> Iterator[Outcome]:
        """The rounds of one layout and clip, up to one that fails."""
        self.pool.start()
        names = layout[0], clip[0]
        if why := self._prepare(layout[1], clip[1].function):
            yield _failed(*names, "layout", why)
            return
        definer = Definer(clip[1], self.whole.weights)
        for each in self._rounds(clip[1]):
            outcome, ended = self._round(names, each, definer)
            yield outcome
            if ended:
                return

    def _rounds(self, clip: Clip) -> list[Round]:
        rounds = [Round(f"step {i}", i, 0.5) for i in range(len(self.task.steps))]
        if self.max_norm is None and clip.expected is None:
            rounds.append(Round("nothing to clip", 0, 2.0))
        if self.nonfinite:
            rounds.append(Round(f"NaN on rank {self.pool.size - 1}", 0, 0.5, nonfinite=True))
        return rounds

    def _prepare(self, layout: Any, clip: Any) -> str:
        """Builds and shards on every rank. Returns what failed.

        Raises:
            ValueError: the functions cannot be used at all.
        """
        task = pickle.dumps(self.task._replace(layout=layout, clip=clip))
        answers = self.pool.call("prepare", task, limit_s=START_S)
        for rank, answer in enumerate(answers):
            if answer.error.startswith(INVALID):
                raise ValueError(answer.error.removeprefix(INVALID))
            if not answer.failed and answer.value != self.whole.digest:
                self.pool.stop()
                raise ValueError(
                    f"cannot compare the model: build() made other weights on rank {rank} than in "
                    f"one process, with the same seed. Take random numbers from torch's default "
                    f"generator alone, and nothing from the rank; shard in the layout."
                )
        return outcomes_by_rank(answers)

    def _round(self, names: tuple[str, str], each: Round, definer: Definer) -> tuple[Outcome, bool]:
        """The outcome, and whether the ranks have ended."""
        last = self.pool.size - 1
        nonfinite = PerRank(each.nonfinite and rank == last for rank in range(last + 1))
        stepped = self.pool.call("step", each.step, nonfinite, limit_s=START_S)
        if why := outcomes_by_rank(stepped):
            return _failed(*names, each.name, f"before the clip: {why}"), True
        before = assemble([answer.value for answer in stepped])
        if not before.whole:
            self.pool.stop()
            raise ValueError(
                f"cannot compare {each.name} of {names[0]}: it left no gradients on any rank. "
                f"Return the loss of this rank's share of the batch; if the gradients are not in "
                f"`.grad`, pass `gradients=`."
            )
        whole = self.whole.gradients[each.step]
        limit = self.max_norm or each.of_norm * (total_norm(whole, definer.clip.norm_type) or 2.0)
        clipped = self.pool.call("clip", limit, limit_s=self.timeout_s)
        if each.nonfinite:
            arrived = any(_is_nonfinite(piece) for answer in stepped for piece in answer.value)
            return _of_nonfinite(names, each.name, clipped, arrived), True
        if why := outcomes_by_rank(clipped):
            return _failed(*names, each.name, why), True
        shown = self.pool.call("gradients", limit_s=START_S)
        if why := outcomes_by_rank(shown):
            return _failed(*names, each.name, f"after the clip: {why}"), True
        after = assemble([answer.value for answer in shown])
        outcome = compare(
            whole,
            after.whole,
            limit,
            norms=[answer.value for answer in clipped],
            before=before.whole,
            definer=definer,
            scale=self.scale,
            copies={**before.copies, **after.copies},
            dtype=self.dtype,
            layout=names[0],
            name=names[1],
            step=each.name,
        )
        return outcome, False


def _is_nonfinite(piece: Piece) -> bool:
    return piece.values is not None and not piece.values.isfinite().all()


def _failed(layout: str, clip: str, step: str, why: str) -> Outcome:
    return Outcome(layout, clip, step, {"ranks": Cell(_short(why), False, (why,))})


def _of_nonfinite(
    names: tuple[str, str], step: str, clipped: Sequence[Answer], arrived: bool
) -> Outcome:
    """Every rank raises, or every rank takes the norm for what it is."""
    why = outcomes_by_rank(clipped)
    if not why:
        cell = nonfinite_cell([answer.value for answer in clipped], arrived)
    elif all(answer.error for answer in clipped):
        cell = Cell(_short(why), True)
    else:
        cell = Cell(_short(why), False, (why,))
    return Outcome(*names, step, {"ranks": cell})


def _short(why: str) -> str:
    return why if len(why) <= 60 else f"{why[:57]}..."
