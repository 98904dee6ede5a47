"""The CPU, at the speed of its memory where Numba is installed, and not far from it with torch's operators.

torch's sums of squares are float32 along short rows, one call for a run of any length. A row is so short that its norm
errs by 3e-7 at most, where all elements are equal, so that every rounding errs to the same side, and by 5e-8 over many
rows of unequal ones; what the rows give is added up in float64. Where squares leave the range of float32, `loops` does
the work again in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels import naive as loops
from distclip.kernels.contiguous import flat

clamp_, scale_each_, zero_ = loops.clamp_, loops.scale_each_, loops.zero_

# The overload for Python numbers rounds them to 16 bits where tensors have so few; that for tensors does not.
_foreach_mul_: Any = vars(torch)["_foreach_mul_"]
_flatten: Any = torch.ops.aten.flatten_dense_tensors
_group_norm_backward: Any = torch.ops.aten.native_group_norm_backward.default

# The elements of a row, for each dtype: shorter rows take longer than memory does. A square of bf16 has 16 bits, so
# that float32 adds up many of them without rounding.
_ROW = {torch.float32: 256, torch.float16: 256, torch.bfloat16: 512}
_ROWS = 4  # of 16 bits, give one number: fewer to make a float64 of
_MEAN, _RSTD = torch.zeros(_ROWS, 1, device="cpu"), torch.ones(_ROWS, 1, device="cpu")
_SHORT = 1 << 12  # elements: in shorter runs the calls cost more than the elements, so that they are copied together
_PACK = 1 << 15  # elements of such a copy: it stays in the cache of a core, and one core does the work
_EXACT = 1 << 16  # elements: so few are all added up in float64
_MANY = 1 << 22  # elements: with fewer, Numba gains little beside the price of a call, and takes long to import
# Squares below float32's range are lost or rounded: by less than 2**-26 of the sum where the mean square is above this.
_LEAST_MEAN = 2.0**-100


def power_sum(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """sum(|x|**p) over all tensors, of one dtype, together, or max(|x|) for p = inf: a float64 scalar."""
    dtype = tensors[0].dtype
    if norm_type == 2 and dtype in _ROW:
        return _squares(tensors)
    if not math.isinf(norm_type):
        return loops.power_sums(tensors, norm_type).sum()
    return loops.power_sums(tensors, norm_type).amax() if dtype.is_complex else _largest(tensors)


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """See `loops.power_sums`."""
    if all(tensor.numel() <= _EXACT for tensor in tensors):
        return loops.power_sums(tensors, norm_type)
    return torch.stack([power_sum([tensor], norm_type) for tensor in tensors])


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """See `loops.norms`."""
    return power_sums(tensors, norm_type) if math.isinf(norm_type) else loops.norms(tensors, norm_type)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See `loops.scale_`."""
    if coefficient.item() == 1:
        return
    many = tensors[0].dtype in _ROW and sum(map(Tensor.numel, tensors)) >= _MANY
    if many and (compiled := _numba()) and (whole := list(filter(Tensor.is_contiguous, tensors))):
        compiled.scale_(whole, coefficient)
        tensors = [tensor for tensor in tensors if not tensor.is_contiguous()]
    if tensors:
        wide = torch.promote_types(tensors[0].dtype, torch.float32).to_real()
        _foreach_mul_(list(tensors), coefficient.to(wide))


def _largest(joined: Sequence[Tensor]) -> Tensor:
    long, packs = _blocks(joined, list(map(Tensor.numel, joined)), _SHORT)
    full = [block for block in (*long, *packs) if block.numel()]
    ends = [end.abs().double() for block in full for end in torch.aminmax(block)]
    return torch.stack(ends).amax() if ends else torch.zeros((), dtype=torch.float64, device="cpu")


def _squares(joined: Sequence[Tensor]) -> Tensor:
    """The sum of squares of 16- or 32-bit numbers."""
    numels = list(map(Tensor.numel, joined))
    numel = sum(numels)
    if numel >= _MANY and (compiled := _numba()):
        long, packs = [flat(run).contiguous() for run in joined], []
        squares = compiled.squares
    else:
        row = _ROW[joined[0].dtype]
        long, packs = _blocks(joined, numels, _SHORT if numel > _EXACT else numel, _ROWS * row)
        squares = _rows
    # A dot would wake the other cores for these few.
    sums = [cast(Tensor, torch.linalg.vector_norm(pack.double())).square() for pack in packs]
    if long:
        found = squares(long)
        fits = _LEAST_MEAN * numel <= found.item() < math.inf
        sums.append(found if fits else loops.power_sums(long, 2.0).sum())
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


@cache
def _numba() -> ModuleType | None:
    """None where Numba is missing, or fails: it may know neither this Python nor this NumPy."""
    try:
        from distclip.kernels import cpu_numba as numba

        numba.scale_([torch.ones(1, device="cpu")], numba.squares([torch.ones(1, device="cpu")]))
    except ModuleNotFoundError:
        return None
    except Exception as error:  # Numba raises anything, and training should go on
        warnings.warn(f"Numba does not run here, so that clipping on the CPU is slower: {error!r}", stacklevel=2)
        return None
    return numba


def _rows(runs: Sequence[Tensor]) -> Tensor:
    """The sum of squares of runs of whole rows, `_ROWS` at a time: float32 along a row, float64 over the rows."""
    row = _ROW[runs[0].dtype]
    if runs[0].dtype is torch.float32:
        norms = torch.cat([torch.linalg.vector_norm(run.view(-1, row), dim=1) for run in runs]).double()
        return torch.dot(norms, norms)
    return torch.cat([_squares_of_16_bits(run, row) for run in runs]).double().sum()


def _squares_of_16_bits(run: Tensor, row: int) -> Tensor:
    """Sums of squares, float32, of `_ROWS` rows each.

    torch's norms of 16 bits have 16 bits. The backward of a group norm reads 16 bits, gives 32, and writes less than it
    reads, faster than any other operator that was tried (benchmarks/NOTES.md): the gradient of the weight of channel c
    is the sum of (x - mean) * y / std over the channel in all samples. Here x and y are both the run: `_ROWS` samples,
    whose channels are rows; mean is 0 and std is 1. Infinities give NaN.
    """
    channels = run.numel() // (_ROWS * row)
    weight = torch.empty(channels, device="cpu")
    return _group_norm_backward(run, run, _MEAN, _RSTD, weight, _ROWS, channels, row, 1, [False, True, False])[1]


def _blocks(
    joined: Sequence[Tensor], numels: Sequence[int], short: int, row: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Flat views of runs longer than `short`, as far as `row` goes; and copies, packs, that hold all the rest."""
    if numels and max(numels) <= short:
        return [], _packed(joined, numels)
    long: list[Tensor] = []
    rest: list[Tensor] = []
    for run, numel in zip(joined, numels, strict=True):
        if numel <= short:
            rest.append(run)
        elif tail := numel % row:
            values = flat(run)
            long.append(values[: numel - tail])
            rest.append(values[numel - tail :])
        else:
            long.append(flat(run))
    return long, _packed(rest, list(map(Tensor.numel, rest)))


def _packed(several: Sequence[Tensor], numels: Sequence[int]) -> list[Tensor]:
    """Flat copies of as many tensors each, of about a pack."""
    if not several:
        return []
    num = min(len(several), -(-sum(numels) // _PACK)) or 1
    step = -(-len(several) // num)
    return [_copied(several[i : i + step]) for i in range(0, len(several), step)]


def _copied(several: Sequence[Tensor]) -> Tensor:
    # cat takes tensors of one number of dims; a view of each would take longer than all the rest.
    return torch.cat(list(several)) if set(map(Tensor.dim, several)) == {1} else _flatten(several)
