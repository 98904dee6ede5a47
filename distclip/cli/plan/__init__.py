"""`distclip plan`: who counts what, and what is sent, for a mesh of any size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distclip.cli.console import UserError

if TYPE_CHECKING:
    from distclip.cli.plan.result import PlanResult

MAX_RANKS = 2**20  # a mesh of so many takes torch four seconds to make

PolicyName = Literal[
    "clip-norm",
    "tensor-norm",
    "block-rms",
    "value",
    "agc",
    "autoclip",
    "zclip",
    "adagc",
    "adagn",
    "aggc",
    "skip-spike",
]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Shows which rank counts which tensors, and what is sent, for a mesh of any size.

    One process takes the place of one rank after the other; it needs no GPU and no memory for the
    model. The model is made once for each pipeline stage.
    """

    model: str
    """module:function or file.py:function. The function takes the DeviceMesh (of CPUs; the default
    device is meta) and returns the model as this rank shards it, a list of the parts of its
    pipeline stage, or a distclip.Clipper. A function that takes nothing and returns a plain model
    is enough for FSDP2: the axis fsdp or dp_shard shards it, and dp, ddp or dp_replicate hold
    copies."""
    mesh: str
    """Names and sizes of the mesh axes, such as pp=2,fsdp=8,tp=4; neighbouring ranks differ in the
    last axis. Ranks along pp hold different parameters."""
    rank: int = 0
    """The rank whose part is shown."""
    policy: PolicyName = "clip-norm"
    """What the gradients are clipped by. Its thresholds do not matter."""
    tensor_norms: bool = False
    """Also measure the norm of every tensor, as Clipper(tensor_norms=...)."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> PlanResult:
        """Makes the model on simulated ranks and plans it.

        Raises:
            UserError: an option cannot be used, or the model cannot be made or planned.
        """
        mesh = read_mesh(self.mesh)
        from distclip.cli.plan.ranks import plan_ranks
        from distclip.cli.plan.records import Request
        from distclip.cli.plan.result import PlanResult
        from distclip.cli.plan.users_code import load_function

        function, policy = load_function(self.model), _policy(self.policy)
        request = Request(self.model, function, mesh, policy, self.tensor_norms)
        if not 0 <= self.rank < request.world_size:
            raise UserError(
                f"--rank {self.rank}: the ranks of --mesh {self.mesh} are 0 to "
                f"{request.world_size - 1}"
            )
        return PlanResult(self.model, mesh, plan_ranks(request, self.rank))


def read_mesh(text: str) -> dict[str, int]:
    """The sizes of the axes in `pp=2,fsdp=8`.

    Raises:
        UserError: it cannot be read, or has too many ranks.
    """
    mesh: dict[str, int] = {}
    world_size = 1
    for part in text.split(","):
        found = re.fullmatch(r"\s*([^\W\d]\w*)\s*=\s*(\d{1,9})\s*", part)
        if found is None:
            raise UserError(f"--mesh {text}: cannot read {part!r}; write pp=2,fsdp=8,tp=4")
        axis, size = found[1], int(found[2])
        if axis in mesh:
            raise UserError(f"--mesh {text}: the axis {axis!r} is given twice")
        if size < 1:
            raise UserError(f"--mesh {text}: {axis}={size}, but an axis has at least 1 rank")
        mesh[axis] = size
        world_size *= size
    if world_size > MAX_RANKS:
        raise UserError(f"--mesh {text}: {world_size:,} ranks, of at most {MAX_RANKS:,}")
    return mesh


def _policy(name: PolicyName) -> Any:
    from distclip import policies

    made: dict[PolicyName, Any] = {
        "clip-norm": policies.ClipNorm(1.0),
        "tensor-norm": policies.ClipTensorNorm(1.0),
        "block-rms": policies.ClipBlockRMS(1.0),
        "value": policies.ClipValue(1.0),
        "agc": policies.AGC(),
        "autoclip": policies.AutoClip(),
        "zclip": policies.ZClip(),
        "adagc": policies.AdaGC(),
        "adagn": policies.AdaGN(),
        "aggc": policies.AGGC(),
        "skip-spike": policies.SkipSpike(),
    }
    return made[name]
