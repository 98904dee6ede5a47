"""The tests that run on other versions of torch and Python: all of what depends on either."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
# Trainers, the example, the cluster, benchmarks and documents are tested on the pinned versions.
FOLDERS = ["kernels", "norms", "policies", "sharding", "training"]
LEFT_OUT = {"test_docs.py", "test_examples.py", "test_gpu.py", "test_architecture.py"}

# `--quick`: what depends most on the version of torch.
QUICK = [
    "tests/sharding/test_wrapped.py",
    "tests/sharding/test_read.py",
    "tests/sharding/test_mesh.py",
    "tests/sharding/test_newer_torch.py",
    "tests/sharding/test_offload.py",
    "tests/sharding/test_one_shot.py",
    "tests/norms/test_total_norm.py",
    "tests/norms/test_verify.py",
    "tests/training/test_grad_scaler.py",
    "tests/training/test_step_hook.py",
    "tests/test_api.py",
    "tests/test_nonfinite.py",
    "tests/test_groups.py",
    "tests/test_step.py",
    "tests/test_torch_version.py",
    "tests/test_torch_defects.py",
]


def core() -> list[str]:
    files = [file for file in (ROOT / "tests").glob("test_*.py") if file.name not in LEFT_OUT]
    return [f"tests/{folder}" for folder in FOLDERS] + sorted(f"tests/{f.name}" for f in files)
