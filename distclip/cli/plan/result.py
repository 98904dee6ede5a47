"""What `distclip plan` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distclip.cli.plan.ranks import PlannedRanks
from distclip.cli.plan.records import PlannedRank
from distclip.cli.plan.rows import Row, tensor_rows

FLOAT64_BYTES = 8


@dataclass(frozen=True)
class PlanResult:
    """The plan of a model on a mesh. model: as the user names it; mesh: sizes by axis."""

    model: str
    mesh: Mapping[str, int]
    planned: PlannedRanks

    def to_dict(self) -> dict[str, Any]:
        """All of it; "tensors" stand under the ranks that were simulated, one for each stage."""
        messages = self.planned.messages
        return {
            "model": self.model,
            "mesh": dict(self.mesh),
            "ranks": prod(self.mesh.values()),
            "elements": self.elements,
            "policies": self.planned.policies,
            "each_step": {
                "all_reduces": 1 if messages.numbers else 0,
                "all_gathers": messages.all_gathers,
                "float64": messages.numbers,
                "bytes": messages.numbers * FLOAT64_BYTES,
                "over": messages.axes,
            },
            "at_construction": messages.at_construction,
            "rank": _without_tensors(self.planned.rank),
            "stages": [stage.to_dict() for stage in self.planned.stages],
        }

    @property
    def elements(self) -> int:
        """Of the whole model, all pipeline stages together."""
        return sum(stage.elements for stage in self.planned.stages)

    @property
    def _has_stages(self) -> bool:
        return len(self.planned.stages) > 1

    def __rich__(self) -> RenderableType:
        axes = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        title = f"{self.model}: {self.elements:,} elements on {axes} ranks"
        parts = [Text(title), self._tensors(), Text(self._legend()), Text(self._rank())]
        if self._has_stages:
            parts.insert(3, _stages(self.planned.stages))
        sentences = [self._each_step(), *self._policies(), *self._setup()]
        return Group(*(Group(part, "") for part in parts), *map(Text, sentences))

    def _tensors(self) -> Table:
        rows, rank = tensor_rows(self.planned.stages), self.planned.rank.rank
        axes = self._axes(rows)
        group = ["group"] if len(self.planned.policies) > 1 else []
        titles = [f"{axis}={self.mesh[axis]}" if axis in self.mesh else axis for axis in axes]
        table = _table(
            [*group, "tensor", *titles], ["num", "elements", f"on rank {rank}", "counted"]
        )
        for row in rows:
            words = [row.first.group, row.name] if group else [row.name]
            numbers = row.elements, row.held_by(rank), row.counted_by(rank)
            cells = [*words, *(self._cell(row, axis) for axis in axes)]
            table.add_row(*map(Text, [*cells, f"{len(row.tensors):,}", *map(_number, numbers)]))
        return table

    def _axes(self, rows: Sequence[Row]) -> list[str]:
        """Those of the mesh that have several ranks, then those of other meshes."""
        layouts = (row.first.sharded_over + row.first.copied_over for row in rows)
        others = {axis for axes in layouts for axis in axes} - set(self.mesh)
        return [*(axis for axis, size in self.mesh.items() if size > 1), *sorted(others)]

    def _cell(self, row: Row, axis: str) -> str:
        if axis in self.planned.rank.stage:
            return row.indices(axis)
        if axis in row.first.sharded_over:
            return "shard"
        if axis in row.first.copied_over:
            return "declared" if row.first.declared else "copy"
        return ""

    def _legend(self) -> str:
        counts = "which the rank at index 0 counts"
        if not self.planned.messages.numbers:
            counts = "which each rank counts for itself"
        stages = " A number: the stages that have the tensors." if self._has_stages else ""
        return (
            f"shard: the ranks along the axis have different elements; copy: the same ones, "
            f"{counts}.{stages}"
        )

    def _rank(self) -> str:
        rank = self.planned.rank
        at = ", ".join(f"{axis}={index}" for axis, index in rank.coordinate.items())
        weights = f" and {rank.weight_bytes:,} of weights" if rank.weight_bytes else ""
        return (
            f"Rank {rank.rank} ({at}): has {rank.held:,} elements of {len(rank.tensors):,} "
            f"tensors, and counts {rank.counted:,}. Each step reads {rank.gradient_bytes:,} bytes "
            f"of gradients{weights}."
        )

    def _each_step(self) -> str:
        messages = self.planned.messages
        if not messages.numbers:
            return "Each step: no collective, because no rank has elements that another lacks."
        axes = " x ".join(f"{axis}={size}" for axis, size in messages.axes.items())
        size = f"{messages.numbers * FLOAT64_BYTES:,} bytes"
        gathers = f", and {messages.all_gathers} all-gathers" if messages.all_gathers else ""
        return (
            f"Each step: one all-reduce of {messages.numbers:,} float64 ({size}) over "
            f"{messages.ranks:,} ranks ({axes}){gathers}."
        )

    def _policies(self) -> Iterator[str]:
        named = len(self.planned.policies) > 1
        for group, policy in self.planned.policies.items():
            yield f"Policy of {group}: {policy}." if named else f"Policy: {policy}."

    def _setup(self) -> Iterator[str]:
        texts = self.planned.messages.at_construction
        yield "When the Clipper is made:" + ("" if texts else " no collective.")
        yield from (f"- {text}" for text in texts)


def _without_tensors(rank: PlannedRank) -> dict[str, Any]:
    return {name: value for name, value in rank.to_dict().items() if name != "tensors"}


def _stages(stages: Sequence[PlannedRank]) -> Table:
    table = _table(
        ["stage", "rank"], ["tensors", "elements", "on the rank", "counted", "bytes read"]
    )
    for stage in stages:
        at = ", ".join(f"{axis}={index}" for axis, index in stage.stage.items())
        read = stage.gradient_bytes + stage.weight_bytes
        numbers = len(stage.tensors), stage.elements, stage.held, stage.counted, read
        table.add_row(at, str(stage.rank), *map(_number, numbers))
    return table


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in words:
        table.add_column(title, overflow="fold")
    for title in numbers:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _number(value: int) -> str:
    return f"{value:,}"
