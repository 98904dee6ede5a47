"""Each step's report as a line of JSON, without a wait for the device."""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import torch.distributed as dist
from torch import Tensor

from distclip.arguments import kind_of, shown
from distclip.monitoring.history_file import open_file, write_whole
from distclip.monitoring.lines import FILE_NAME, LAST_STEP, RESERVED, line_of
from distclip.norms.late_reads import recorded_event
from distclip.report import Report
from distclip.sharding.local_tensors import is_dtensor
from distclip.torch_private import has_values

_MOST_PENDING = 16  # steps; the host is rarely so far ahead of an accelerator


class Writer(Protocol):
    """Where a `History` also writes each row, such as TensorBoard."""

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one row: plain numbers, with "groups" and "tensor_norms" as dicts of them."""
        ...

    def close(self) -> None: ...


class _Pending(NamedTuple):
    step: int
    report: Report
    values: dict[str, Any]
    events: Sequence[Any]

    def has_arrived(self) -> bool:
        return all(event.query() for event in self.events)


class History:
    """Appends what happened in each step to `history.jsonl` in a folder.

    Rank 0 writes; on other ranks every call checks its arguments and does nothing else. Figures on
    an accelerator are copied without a wait, and their row is written in a later call, when they
    have arrived. `close` writes the last ones; so does the end of the program. On a CPU each row is
    handed to the system at once: `kill -9` loses no earlier step, and at most cuts the last line.

    A file that exists is continued, on a copy that takes its place: a process of an earlier start
    that still runs writes no more into it. Where the steps go back, as after a resume from a
    checkpoint, readers take the later rows.

    Training goes on where a row cannot be written, as on a full disk: one warning says so, and no
    later row is written.

    It holds the rows of one clipper. Two clippers, such as those of a GAN, have a folder each: of
    two rows with one step, readers take the later.

    Args:
        folder: made where it does not exist.
        after: the step that this run goes on after, such as that of the checkpoint; 0 for a run
            that starts anew in a used folder. Readers leave out later rows of earlier starts.
        writers: where each row goes too: `distclip.monitoring.TensorBoardWriter` or `WandbWriter`.

    Attributes:
        path: of the file.
        failure: why a row could not be written, or None.

    Raises:
        ValueError: `history.jsonl` is there and was not written by this class, or in a later format
            (on rank 0).
        OSError: the folder or the file cannot be made (on rank 0).

    Example:
        >>> import tempfile, torch, distclip
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> clipper = distclip.Clipper([weight], distclip.ClipNorm(1.0))
        >>> with distclip.History(tempfile.mkdtemp()) as history:
        ...     for step in range(1, 4):
        ...         weight.grad = torch.tensor([0.0, float(step)])
        ...         history.append(clipper.clip_(), step=step, lr=0.1)
        >>> print(history.path.read_text().splitlines()[-1])  # doctest: +ELLIPSIS
        {"step": 3, "total_norm": 3.0, "limit": 1.0, "coefficient": 0.33..., "clipped": true, ...
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        after: int | None = None,
        writers: Iterable[Writer] = (),
    ) -> None:
        self.path = Path(folder) / FILE_NAME
        self.failure: str | None = None
        self._writers = list(writers)
        self._has_passed_on = self._is_closed = False
        self._knows_rank = dist.is_initialized() or "RANK" in os.environ
        self._pending: deque[_Pending] = deque()
        self._last_step = 0 if after is None else _as_step("after", after)
        self._file: int | None = None
        if not _is_rank_0():
            return
        self._file, last_step = open_file(self.path, after)
        self._last_step = last_step if after is None else self._last_step
        atexit.register(self.close)

    def append(
        self,
        report: Report,
        step: int | None = None,
        *,
        nonfinite_parameters: Mapping[str, Sequence[int]] | None = None,
        **values: float | bool | str | Tensor,
    ) -> None:
        """Adds the row of one step. No collective, and no wait for the device.

        Args:
            report: of the step; with the norm of every tensor where it has them.
            step: None for the one after the last.
            nonfinite_parameters: what `report.nonfinite_parameters()` said: who caused a NaN. That
                call is a collective where the norm is not finite, so this one does not make it.
            values: anything else: numbers, strings, and tensors of one element, on any device, such
                as `loss=loss.detach()`. A tensor that is written in place meanwhile keeps the
                number that it had.

        Raises:
            TypeError, ValueError: something that cannot be written, on every rank; the history was
                closed.
            RuntimeError: this history was made before the process group, and without torchrun,
                which would have said which rank is 0; on every rank.
        """
        self._check_open()
        if not isinstance(report, Report):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"cannot append {shown(report)} to a history: it is {kind_of(report)}. Pass the "
                f"report that `clip_` or `step` returned."
            )
        values = {name: _checked(name, value) for name, value in values.items()}
        ranks = _ranks_of(nonfinite_parameters or {})
        step = self._last_step + 1 if step is None else _as_step("step", step)
        self._last_step = step
        if self._file is None or not has_values(report.total):
            return
        if ranks:
            values["nonfinite_parameters"] = ranks  # pyright: ignore[reportArgumentType]
        self._pending.append(_copied(step, report, values))
        while self._pending and (
            len(self._pending) > _MOST_PENDING or self._pending[0].has_arrived()
        ):
            self._write(self._pending.popleft())

    def flush(self) -> None:
        """Writes every row that was appended. Waits for the device."""
        while self._pending:
            self._write(self._pending.popleft())

    def close(self) -> None:
        """Writes every row that was appended, and closes the file and the writers."""
        self._is_closed = True
        if self._file is None:
            return
        try:
            self.flush()
        finally:
            atexit.unregister(self.close)
            file, self._file = self._file, None
            closes: list[tuple[Any, Callable[[], None]]] = [(self.path, partial(os.close, file))]
            closes += [(type(writer).__name__, writer.close) for writer in self._writers]
            for name, close in closes:
                try:
                    close()
                except Exception as error:  # rank 0 alone must not end
                    why = f"{name} failed as it was closed: {type(error).__name__}: {error}"
                    warnings.warn(f"{why}. Its last rows may be missing.", stacklevel=2)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"cannot pickle or copy the History of {self.path}: two would write to one file. Leave "
            f"it where it was made, and do not hand what holds it to other processes."
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(
                f"cannot append to the History of {self.path}: it is closed. Append before "
                f"`close()` and inside its `with` block, or make another one."
            )
        if not self._knows_rank and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"cannot append to the History of {self.path}: it was made before the process "
                f"group, and every rank took itself for rank 0. Make it after "
                f"`init_process_group`, or start the ranks with torchrun."
            )

    def _write(self, pending: _Pending) -> None:
        if self.failure is not None or self._file is None:
            return
        for event in pending.events:
            event.synchronize()
        row = _row(pending)
        try:
            write_whole(self._file, line_of(row))
            removed = os.fstat(self._file).st_nlink == 0
        except OSError as error:
            self._fail(f"{self.path} cannot be written: {error.strerror or error}")
            return
        if removed:
            self._fail(f"{self.path} was removed, or belongs to a later start of this run")
            return
        self._pass_on(pending.step, row)

    def _pass_on(self, step: int, row: Mapping[str, Any]) -> None:
        for writer in [*self._writers]:
            try:
                writer.write(step, row)
            except Exception as error:  # rank 0 alone must not end while the others wait for it
                self._writers.remove(writer)
                name, why = type(writer).__name__, f"{type(error).__name__}: {error}"
                self._warn(f"{name} failed in step {step}: {why}")
                with contextlib.suppress(Exception):
                    writer.close()
        if not self._has_passed_on:
            # At the end of the program, before what the writers have opened in their first row ends
            # itself: the last one registered comes first.
            self._has_passed_on = True
            atexit.unregister(self.close)
            atexit.register(self.close)

    def _fail(self, why: str) -> None:
        self.failure = why
        self._warn(why)

    def _warn(self, why: str) -> None:
        warnings.warn(f"{why}. Training goes on, and no later row is written to it.", stacklevel=5)


def _is_rank_0() -> bool:
    # torchrun says so before there is a process group.
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def _copied(step: int, report: Report, values: dict[str, Any]) -> _Pending:
    """Everything on its way to the host."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    devices = {report.total.device, *(tensor.device for tensor in tensors.values())}
    report = report.to("cpu", non_blocking=True)
    for name, tensor in tensors.items():
        # A CPU's tensor would change with the next loss that is written into it.
        values[name] = tensor.item() if tensor.is_cpu else _to_host(tensor)
    events = [event for device in devices if (event := recorded_event(device)) is not None]
    return _Pending(step, report, values, events)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", non_blocking=True)


def _row(pending: _Pending) -> dict[str, Any]:
    report = pending.report
    row: dict[str, Any] = {"step": pending.step, **report.to_dict()}
    row |= {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in pending.values.items()
    }
    if len(report.figures) > 1:
        figures = {"norm": report.norms, "limit": report.limits, "coefficient": report.coefficients}
        row["groups"] = {
            group: {name: float(each[group]) for name, each in figures.items()}
            for group in report.figures
        }
    if tensor_norms := report.tensor_norms():
        row["tensor_norms"] = tensor_norms
        orders = {each.norm_type for each in report.tensors}
        if len(orders) == 1 and orders != {2.0}:
            (row["norm_type"],) = orders
    return row


def _as_step(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LAST_STEP:
        return value
    raise ValueError(
        f"cannot write a history with {name}={shown(value)}: steps are counted in whole numbers "
        f"from 0, of at most 18 digits. Pass an int."
    )


def _ranks_of(given: Any) -> dict[str, list[int]]:
    try:
        return {str(name): [*map(int, ranks)] for name, ranks in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            f"cannot append nonfinite_parameters={shown(given)} to a history: it is "
            f"{kind_of(given)}. Pass what `report.nonfinite_parameters()` returned."
        ) from None


def _checked(name: str, value: Any) -> Any:
    """A value that JSON can have, or a tensor."""
    if name in RESERVED:
        raise ValueError(
            f"cannot append {name}={shown(value)} to a history: that is a figure of the report. "
            f"Choose another name."
        )
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Real):  # such as NumPy's float32, which JSON does not know
        return int(value) if isinstance(value, Integral) else float(value)
    is_tensor = isinstance(value, Tensor) and value.numel() == 1
    if is_tensor and not value.is_complex() and not is_dtensor(value):
        return value
    raise TypeError(
        f"cannot append {name}={shown(value)} to a history: it is {kind_of(value)}. Pass a "
        f"number, a string, or a plain tensor of one element, such as `loss.detach()`; of a "
        f"DTensor, `loss.full_tensor()` on all ranks."
    )
