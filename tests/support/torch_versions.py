"""What is wrong in versions of torch that distclip supports, and the tests that cannot run there.

Each defect has a script in tests/versions/defects/ that shows it in torch alone;
tests/test_torch_defects.py runs it. docs/versions.md lists them for users.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


class Defect(NamedTuple):
    """
    Attributes:
        script: its name in tests/versions/defects/.
        num_ranks: with how many it runs.
        fixed: the first version of torch without it.
        shows: what the script prints on stderr where torch is wrong.
        reason: what goes wrong.
    """

    script: str
    num_ranks: int
    fixed: tuple[int, int]
    shows: str
    reason: str

    @property
    def is_here(self) -> bool:
        return self.fixed > TORCH

    @property
    def skips(self) -> pytest.MarkDecorator:
        return pytest.mark.skipif(
            self.is_here, reason=f"torch {torch.__version__}: {self.reason} ({self.script}.py)"
        )


STRIDED_SHARD = Defect(
    script="strided_shard",
    num_ranks=4,
    fixed=(2, 10),
    shows="came back as",
    reason="`full_tensor()` mixes up elements that two mesh axes shard unevenly along one dim",
)
PIPELINE_OVER_GLOO = Defect(
    script="pipeline_over_gloo",
    num_ranks=2,
    fixed=(2, 10),
    shows="Received data size doesn't match expected size",
    reason="the stages of a pipeline on CPUs end with an abort in the first step",
)
MESH_ROOTS = Defect(
    script="mesh_roots",
    num_ranks=1,
    fixed=(2, 10),
    shows="its root has the axes ('dp', 'tp')",
    reason="a mesh takes the root of another mesh that it equals",
)
FAKE_ALL_GATHER = Defect(
    script="fake_all_gather",
    num_ranks=1,
    fixed=(2, 11),
    shows="no fake impl",
    reason="FSDP2 does not run under FakeTensorMode",
)
DEFECTS = (STRIDED_SHARD, PIPELINE_OVER_GLOO, MESH_ROOTS, FAKE_ALL_GATHER)
