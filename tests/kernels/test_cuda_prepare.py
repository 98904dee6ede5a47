"""`prepare` compiles all the variants of kernels that later steps launch."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

VARIANTS = """
import math, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:  # of a device that this machine lacks
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

class Kernel:
    function = packed_metadata = None
    def launch_metadata(self, *args): pass
    def run(self, *args): pass

variants = []
def compile(function, key, signature, device, constants, options, *_):
    variants.append((function.fn.__name__, tuple(signature.items())))
    kernel = function.device_caches[device][0][key] = Kernel()
    return kernel

triton.runtime.driver.set_active(Driver())
JITFunction._do_compile = compile
from distclip.kernels import cuda, tensor_table
cuda.has_weak_float64 = lambda index: False

DTYPES, p = tensor_table.DTYPES[: int(sys.argv[1])], float(sys.argv[2])
empty = [torch.zeros(1, dtype=dtype) for dtype in DTYPES]
cuda.prepare(empty, p)
print(len(variants))
number = torch.zeros(9, dtype=torch.float64)
for n in (1, 2, 16, 17, 160):
    for size in (0, 1, 17, 70_000):
        tensors = [torch.empty(size + 1, dtype=DTYPES[i % len(DTYPES)])[i % 2 :] for i in range(n)]
        sums = cuda.power_sums(tensors, p)
        where = torch.ones(n + 1, dtype=torch.bool)[1:]
        cuda.power_sums_where(tensors, p, where, sums)
        if p > 6:
            cuda.norms(tensors, p)
        for scalar in number[:3]:  # aligned to 16 bytes or not
            norm = cuda.total(sums, p).norm
            cuda.coefficients(scalar, norm)
            cuda.scale_(tensors, scalar)
            cuda.clamp_(tensors, scalar)
        cuda.coefficients(sums[1:], sums[1:])
        for limit in (0.0, 5e-324, 1e-310, 1.0, -1.0, math.inf, math.nan):
            cuda.coefficients(sums, torch.tensor(limit, dtype=torch.float64))
        cuda.scale_each_(tensors, torch.zeros(n + 1, dtype=torch.float64)[1:])
        cuda.zero_(tensors, where[0])
        cuda.power_sums(tensors, p)
print(len(variants), variants)
"""


@pytest.mark.parametrize(("num_dtypes", "norm_type"), [(1, 2.0), (3, math.inf), (3, 8.0), (4, 2.0)])
def test_nothing_is_compiled_after_prepare(num_dtypes: int, norm_type: float) -> None:
    """For any number and alignment of tensors and operands. The compiler itself is left out."""
    environment = {**os.environ}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", VARIANTS, str(num_dtypes), str(norm_type)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    prepared, after = run.stdout.splitlines()
    # Sums of all and of some, and four rewrites, for each dtype; finish, total, and coefficients
    # with the limit on the device or not.
    expected = num_dtypes * 6 + 4
    if norm_type == 8 or num_dtypes == 4:
        expected += num_dtypes + 1  # norms
    assert int(prepared) == expected
    assert after.split()[0] == prepared, after
