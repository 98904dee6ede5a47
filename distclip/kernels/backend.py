"""What a kind of device must do with the elements of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Total(NamedTuple):
    """The sum of powers of several tensors together, and its root; float64 scalars."""

    power_sum: Tensor
    norm: Tensor


class Backend(Protocol):
    """The operations of one kind of device. A module that has these functions is a backend.

    `naive` defines the results. A new chip is one more module and a line in `kernels._choose`.

    Tensors are real or complex floating point and dense (their layout is `torch.strided`). All the
    tensors of one call lie on one device. `tensors` is never empty, unless a function says so, but
    the tensors in it may be. Norms, sums, coefficients and bounds are float64 on that device,
    whatever the dtype of the tensors and the default dtype and device.

    NaN stays NaN in every result. On an accelerator no function waits for the device.
    """

    def prepare(self, tensors: Sequence[Tensor], norm_type: float) -> None:
        """Compiles what lists of such dtypes and sizes will call. Reads and writes no element.

        Without it the first step compiles. Backends of torch's operators compile nothing.
        """
        ...

    def tensor_lists(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The memory of `tensors` in lists for the other functions; no tensors give no lists.

        Each element is in one list once. On a CPU the tensors of a list have one dtype, and one of
        them may be a flat view of several neighbours. CUDA finds the addresses of a list sooner
        where the same list is passed again.
        """
        ...

    def power_sums(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """sum(|x|**p) of each tensor, or max(|x|) for p = inf; 0 for an empty tensor.

        The sum may overflow for p > 6; `norms` does not. `tensors` may be empty, or a list of
        `tensor_lists`.

        Shapes: the result: [len(tensors)].
        """
        ...

    def power_sums_where(
        self, tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
    ) -> Tensor:
        """`power_sums` where the bools of `where` are true, and `otherwise` elsewhere.

        What is not needed need not be read. `tensors` may be empty.

        Shapes: where, otherwise, the result: [len(tensors)].
        """
        ...

    def norms(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """The p-norm of each tensor, right for any p > 0. `tensors` may be empty.

        Shapes: the result: [len(tensors)].
        """
        ...

    def total(self, power_sums: Tensor, norm_type: float) -> Total:
        """The sum of sums of powers, or the maximum of maxima, and its p-th root.

        Shapes: power_sums: [n], n > 0.
        """
        ...

    def coefficients(self, norms: Tensor, limits: Tensor) -> Tensor:
        """min(1, limit / norm), elementwise; NaN where either is NaN.

        1 up to the limit, also where both are zero or infinite.

        Shapes: norms, the result: [...]; limits: as norms, on their device, or a scalar on the CPU.
        """
        ...

    def prepare_units(
        self, tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
    ) -> None:
        """Compiles what the three functions of units will call for tensors of such shapes."""
        ...

    def unit_power_sums(
        self, tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
    ) -> Tensor:
        """`power_sums` of every unit of each tensor, in order.

        The units of a tensor are the indices of its `dim`; where that is None, the tensor is one
        unit. `tensors` may be empty.

        Shapes: dims: [len(tensors)]; the result: [number of units].
        """
        ...

    def unit_norms(
        self, tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
    ) -> Tensor:
        """`norms` of every unit; see `unit_power_sums`."""
        ...

    def scale_(self, tensors: Sequence[Tensor], coefficient: Tensor) -> None:
        """Multiplies a list of `tensor_lists`.

        The product is rounded to the dtype of the tensor once. The coefficient is not rounded to
        16 bits first, and not to float32 if it is no normal number there (on accelerators without
        Triton it is). A coefficient of 1 changes nothing, and on a CPU it writes nothing.

        Shapes: coefficient: [].
        """
        ...

    def scale_each_(self, tensors: Sequence[Tensor], coefficients: Tensor) -> None:
        """`scale_` of each tensor with its own coefficient.

        Shapes: coefficients: [len(tensors)].
        """
        ...

    def scale_units_(
        self, tensors: Sequence[Tensor], dims: Sequence[int | None], coefficients: Tensor
    ) -> None:
        """`scale_` of every unit with its own coefficient; see `unit_power_sums`.

        Shapes: coefficients: [number of units].
        """
        ...

    def clamp_(self, tensors: Sequence[Tensor], bound: Tensor) -> None:
        """Clamps every element to [-bound, bound]. Tensors are real.

        Shapes: bound: [].
        """
        ...

    def zero_(self, tensors: Sequence[Tensor], where: Tensor) -> None:
        """Sets every element to 0, NaN and infinity too, if `where`, a bool, is true.

        On a CPU nothing is written otherwise.

        Shapes: where: [].
        """
        ...
