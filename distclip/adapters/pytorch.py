"""distclip behind torch's own functions, for trainers and scripts that cannot be changed."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.adapters import torch_functions
from distclip.api import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from distclip.arguments import as_axes, check_function, check_mesh_type
from distclip.sharding.layout import LayoutFunction
from distclip.sharding.mesh import axis_names
from distclip.sharding.stage_mesh import any_dtensor, stage_mesh, without_axes


class _Where(NamedTuple):
    mesh: DeviceMesh | None
    distinct: tuple[str, ...]
    layouts: LayoutFunction | None


@contextmanager
def replacing_torch(
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
    layouts: LayoutFunction | None = None,
) -> Generator[ReplacedTorch]:
    """distclip's functions behind `torch.nn.utils` and FSDP1, until the block ends.

    | what is called                                    | what runs                    |
    |---------------------------------------------------|------------------------------|
    | `torch.nn.utils.clip_grad_norm_`                  | `distclip.clip_grad_norm_`   |
    | `FullyShardedDataParallel.clip_grad_norm_`        | the same, of that module     |
    | `torch.nn.utils.get_total_norm`                   | `distclip.get_total_norm`    |
    | `torch.nn.utils.clip_grads_with_norm_`            | distclip's                   |
    | `torch.nn.utils.clip_grad_value_`                 | distclip's                   |

    The functions stay the same objects, and only what they do changes: names that were imported
    before, bound methods and partials are replaced too. All ranks must be in the block.

    `get_total_norm`, and `clip_grad_norm_` with an infinite `max_norm`, sum over the ranks that the
    tensors lie on, as torch's do, and not over the axes in `distinct`: a trainer that adds up the
    pipeline stages itself counts each once. `clip_grad_norm_` clips by the norm of all stages,
    where the tensors or `mesh` show them.

    A norm is a plain tensor. Where torch would have returned a DTensor it has a `full_tensor()`.
    Texts of numbers, and flags such as 1 or None, are read as torch's functions read them.

    Args:
        mesh, distinct, layouts: as `distclip.clip_grad_norm_` has them.

    Yields:
        what was called, and how often: `replaced.num_calls`.

    Raises:
        ValueError: torch's functions are replaced already.
        LayoutError: in a call, on every rank, where it is unknown which ranks hold which elements:
            for example a list of FSDP1 parameters, of which torch's function takes each rank's
            norm as that of the model.

    Collective: those of the functions.

    Example:
        >>> import torch, distclip
        >>> from torch.nn.utils import clip_grad_norm_
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.tensor([10.0, 20.0, 30.0])
        >>> with distclip.adapters.replacing_torch() as replaced:
        ...     norm = clip_grad_norm_([weight, weight], max_norm=15.0)  # given twice, counted once
        >>> round(norm.item(), 4), replaced.num_calls["clip_grad_norm_"]
        (37.4166, 1)
    """
    check_mesh_type(mesh)
    check_function("layouts", layouts, "`(name, parameter) -> distclip.Layout`, or None")
    replaced = ReplacedTorch(mesh, as_axes("distinct", distinct), layouts)
    with torch_functions.replaced_by(replaced):
        yield replaced


class ReplacedTorch:
    """What runs in the place of torch's functions.

    Attributes:
        num_calls: how often each was called on this rank, by name.
    """

    def __init__(
        self, mesh: DeviceMesh | None, distinct: Sequence[str], layouts: LayoutFunction | None
    ) -> None:
        self.num_calls: Counter[str] = Counter()
        self._whole = _Where(mesh, tuple(distinct), layouts)
        # A slice is another mesh each time it is taken, and plans are kept on meshes.
        self._slice_of = functools.cache(partial(without_axes, distinct=distinct))

    # Not passed on is `foreach`, which says how torch is to do it.
    def clip_grad_norm_(
        self, parameters: Any, max_norm: Any, norm_type: Any, error: Any, foreach: Any
    ) -> Tensor:
        self.num_calls["clip_grad_norm_"] += 1
        given, limit = _listed(parameters), _number(max_norm)
        where = self._stage(given) if _is_infinite(limit) else self._whole
        if _is_infinite(limit) and where.mesh is None and _is_empty(given):
            return torch.tensor(0.0)
        norm = clip_grad_norm_(given, limit, _number(norm_type), _is_true(error), **where._asdict())
        return _as_torch_returns(norm, given)

    def get_total_norm(self, tensors: Any, norm_type: Any, error: Any, foreach: Any) -> Tensor:
        self.num_calls["get_total_norm"] += 1
        given = _listed(tensors)
        where = self._stage(given)
        if where.mesh is None and _is_empty(given):
            return torch.tensor(0.0)  # as torch: of no tensors, such as the experts of a stage
        norm = get_total_norm(given, _number(norm_type), _is_true(error), **where._asdict())
        return _as_torch_returns(norm, given)

    def clip_grads_with_norm_(
        self, parameters: Any, max_norm: Any, total_norm: Any, foreach: Any
    ) -> None:
        self.num_calls["clip_grads_with_norm_"] += 1
        clip_grads_with_norm_(parameters, _number(max_norm), total_norm)

    def clip_grad_value_(self, parameters: Any, value: Any, foreach: Any) -> None:
        self.num_calls["clip_grad_value_"] += 1
        clip_grad_value_(parameters, _number(value))

    def _stage(self, tensors: Any) -> _Where:
        """The ranks that share one pipeline stage."""
        whole = self._whole
        mesh = None if whole.mesh is None else self._slice_of(whole.mesh)
        if mesh is None:
            mesh = stage_mesh(_tensors(tensors), self._slice_of)
        axes = () if mesh is None else axis_names(mesh)
        return whole._replace(mesh=mesh, distinct=tuple(a for a in whole.distinct if a in axes))


def _listed(given: Any) -> Any:
    """Generators as lists; an empty one as it is, of which distclip warns as torch does."""
    if not isinstance(given, Iterator):
        return given
    return list(cast("Iterator[Any]", given)) or cast(Any, given)


def _tensors(given: Any) -> list[Tensor]:
    """The tensors in `given`; what else there is, distclip's functions refuse."""
    if isinstance(given, nn.Module):
        return list(given.parameters())
    if isinstance(given, Tensor):
        return [given]
    return [each for each in given if isinstance(each, Tensor)] if _is_iterable(given) else []


def _is_iterable(given: Any) -> bool:
    return hasattr(given, "__iter__")


def _is_empty(given: Any) -> bool:
    return isinstance(given, Sized) and not isinstance(given, nn.Module) and len(given) == 0


def _number(given: Any) -> Any:
    """As a float where torch's functions make one: also texts, such as those of a command line."""
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return given  # which distclip's functions refuse


def _is_true(given: Any) -> Any:
    """Flags as torch's functions read them; no texts, which would always be true."""
    return bool(given) if given is None or isinstance(given, int | float) else given


def _is_infinite(max_norm: Any) -> bool:
    return isinstance(max_norm, float) and math.isinf(max_norm)


def _as_torch_returns(norm: Tensor, given: Any) -> Tensor:
    """`norm`, with the method that callers of torch's functions use where torch has a DTensor."""
    if any_dtensor(_tensors(given)):
        # Not a function made here: the norm can be pickled, and sent to other processes.
        setattr(norm, "full_tensor", norm.detach().clone)  # noqa: B010 - not a tensor's attribute
    return norm
