"""What each rank holds of the gradients, and the whole gradients made of it in another process.

No collective is needed: ranks that hang or disagree are what the comparison is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from distclip.sharding.dtensor import layout_on, ranks_by_axis
from distclip.sharding.local_tensors import is_dtensor, local_memory
from distclip.sharding.read import READERS, named_parameters
from distclip.sharding.shard import BlockShard, FlatBlockShard, FlatShard, ParamShard
from distclip.sharding.tensor_layout import ParamReader

# What users pass as `gradients=`: from the model, whole gradients by the name of the parameter.
Gradients: TypeAlias = Callable[[Any], Mapping[str, "Tensor | None"]]


class Piece(NamedTuple):
    """What a rank holds of one gradient.

    Attributes:
        part: which elements; None: all.
        values: on the CPU; a range of a flattened tensor is 1-d. None: no gradient here.
        summand: where several ranks hold a sum in parts (`Partial`): the coordinate of this part.
    """

    name: str
    shape: tuple[int, ...]
    part: ParamShard | None
    values: Tensor | None
    summand: tuple[int, ...] = ()


class Assembled(NamedTuple):
    """Whole gradients.

    Attributes:
        whole: by name, in the dtype of the pieces; without those that no rank has.
        copies: for each gradient whose copies have other bits on some rank, which ranks.
    """

    whole: dict[str, Tensor]
    copies: dict[str, str]


def gradient_pieces(model: Any, gradients: Gradients | None = None) -> list[Piece]:
    """What this rank holds of the gradients of `model`, to be sent to `assemble`.

    Args:
        model: a module: plain, DDP, FSDP1, FSDP2, or of DTensors.
        gradients: from the model, whole gradients by name, where they are not in `.grad`.

    Raises:
        TypeError: `gradients` returned something else.

    Collective: none but those of `gradients`.
    """
    if gradients is not None:
        return [_whole_piece(name, grad) for name, grad in _items(gradients(model))]
    readers = [make_reader([model]) for make_reader in READERS]
    named = [(name, param) for name, param in named_parameters(model) if param.requires_grad]
    return [piece for name, param in named for piece in _pieces(name, param, readers)]


def assemble(by_rank: Sequence[Sequence[Piece]]) -> Assembled:
    """The whole gradients, from what `gradient_pieces` returned on each rank, in their order.

    Elements that no rank has are zero. Where copies differ, those of the first rank are taken.

    Raises:
        ValueError: ranks say that a gradient has different shapes.
    """
    holders: dict[str, list[tuple[int, Piece]]] = {}
    for rank, pieces in enumerate(by_rank):
        for piece in pieces:
            holders.setdefault(piece.name, []).append((rank, piece))
    assembled = Assembled({}, {})
    for name, held in holders.items():
        _check_shapes(name, held)
        present = [(rank, piece) for rank, piece in held if piece.values is not None]
        if present:
            assembled.whole[name] = _whole(present)
            if differs := _differing(present):
                assembled.copies[name] = differs
    return assembled


def _whole_piece(name: str, grad: Tensor | None) -> Piece:
    if grad is None:
        return Piece(name, (), None, None)
    return Piece(name, tuple(grad.shape), None, _copy(grad))


def _items(found: Any) -> list[tuple[str, Tensor | None]]:
    kind = type(found).__qualname__
    if isinstance(found, Mapping):
        items: list[tuple[Any, Any]] = list(cast("Mapping[Any, Any]", found).items())
        if all(isinstance(n, str) and isinstance(g, Tensor | None) for n, g in items):
            return items
    raise TypeError(
        f"cannot compare what `gradients` returned: it is a {kind}, but each gradient is compared "
        f"with that of the whole model under its name. Return a dict {{name: whole gradient, or "
        f"None}}."
    )


def _pieces(name: str, param: nn.Parameter, readers: Sequence[ParamReader]) -> Iterator[Piece]:
    grad: Any = param.grad
    if grad is not None and is_dtensor(grad):
        # As the gradient lies, which may be unlike its parameter.
        mesh = grad.device_mesh
        layout = layout_on(name, grad.shape, mesh, grad.placements, ranks_by_axis(mesh))
        placed = zip(mesh.get_coordinate() or (), grad.placements, strict=False)
        summand = tuple(at for at, placement in placed if placement.is_partial())
        (part,) = layout.shards
        yield Piece(name, tuple(grad.shape), part, _copy(local_memory(grad)), summand)
        return
    found = (read(name, param) for read in readers)
    layout = next((layout for layout in found if layout is not None), None)
    if layout is None:
        shape = tuple(param.shape)
        yield Piece(name, shape, None, None if grad is None else _copy(grad))
        return
    for part in layout.shards:  # a flat parameter has several tensors
        yield Piece(part.name, part.global_shape, part, _values_of(part, grad))


def _values_of(part: ParamShard, grad: Tensor | None) -> Tensor | None:
    shard = part.shard
    if grad is None:
        return None
    if isinstance(shard, BlockShard):
        return _copy(grad).view(shard.sizes)
    flat = shard.flat if isinstance(shard, FlatBlockShard) else shard
    return _copy(grad.reshape(-1)[flat.offset : flat.offset + flat.numel])


def _copy(grad: Tensor) -> Tensor:
    grad = grad.detach()
    dense = grad if grad.layout is torch.strided else grad.to_dense()
    return dense.cpu().resolve_neg().resolve_conj().contiguous().clone()


def _check_shapes(name: str, held: Sequence[tuple[int, Piece]]) -> None:
    shapes = {piece.shape: rank for rank, piece in held if piece.values is not None}
    if len(shapes) > 1:
        texts = ", ".join(f"{shape} on rank {rank}" for shape, rank in shapes.items())
        raise ValueError(
            f"cannot put together the gradient of {name!r}: it has the shape {texts}. Ranks hold "
            f"parts of it, and nothing on the tensor says which. Pass `gradients=`, a function "
            f"that returns whole gradients by name."
        )


def _whole(present: Sequence[tuple[int, Piece]]) -> Tensor:
    first = present[0][1]
    assert first.values is not None
    whole = torch.zeros(first.shape, dtype=first.values.dtype)
    summands: dict[tuple[int, ...], Tensor] = {}
    for _, piece in reversed(present):  # the first rank last
        into = (
            summands.setdefault(piece.summand, torch.zeros_like(whole)) if piece.summand else whole
        )
        _write(into, piece)
    return whole + sum(summands.values()) if summands else whole


def _write(whole: Tensor, piece: Piece) -> None:
    values = piece.values
    assert values is not None
    if piece.part is None:
        whole.copy_(values)
        return
    shard = piece.part.shard
    block = shard if isinstance(shard, BlockShard) else getattr(shard, "block", None)
    inside = whole if block is None else _block_of(whole, block)
    if isinstance(shard, BlockShard):
        inside.copy_(values)
        return
    flat = shard.flat if isinstance(shard, FlatBlockShard) else shard
    assert isinstance(flat, FlatShard)
    elements = inside.reshape(-1)  # a copy where the block is not contiguous
    elements[flat.start : flat.start + flat.numel] = values
    inside.copy_(elements.view(inside.shape))


def _block_of(whole: Tensor, block: BlockShard) -> Tensor:
    for dim, (offset, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def _differing(present: Sequence[tuple[int, Piece]]) -> str:
    """Which ranks hold other bits than the first with the same elements; "" where none does."""
    first: dict[Any, Tensor] = {}
    others: list[int] = []
    for rank, piece in present:
        values = cast(Tensor, piece.values)
        other = first.setdefault((_elements(piece), piece.summand), values)
        if other.dtype != values.dtype or not _same_bits(other, values):
            others.append(rank)
    return f"other bits on ranks {others} than on the first that holds it" if others else ""


def _elements(piece: Piece) -> object:
    """Equal for pieces with the same elements."""
    if piece.part is None:
        return BlockShard.whole(piece.shape)
    shard = piece.part.shard
    if isinstance(shard, BlockShard):
        return BlockShard(shard.global_shape, shard.offsets, shard.sizes)
    if isinstance(shard, FlatBlockShard):
        return shard.block.offsets, shard.block.sizes, shard.flat.start, shard.flat.numel
    return shard.start, shard.numel


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
