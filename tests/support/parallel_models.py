"""A small model of dense, expert and attention blocks that can be cut into pipeline stages, and how
to check its clip.

In float64: what is left between the parts and the whole model is rounding, so that tolerances can
be tight.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip
from tests.support import reference
from tests.support.ranks import same_bits_everywhere
from tests.support.wrapped import Block, local

WIDTH, HIDDEN, VOCAB, EXPERTS, HEAD_DIM = 8, 6, 12, 8, 4
BATCH, LENGTH = 16, 4


class Experts(nn.Module):
    """The matrices of all experts in one tensor each. A rank may hold a part of the experts.

    Attributes:
        idle: none of them gets a token, on any rank that holds them: FSDP waits if it is so on some
        of these alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.idle = False

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """x: tokens in the order of the experts; counts: how many each expert gets."""
        if self.idle:
            return x  # without a use of the weights, so that their gradients stay None
        pairs = zip(x.split(list(counts)), local(self.w_in), local(self.w_out), strict=True)
        return torch.cat([(tokens @ w_in).relu() @ w_out for tokens, w_in, w_out in pairs])


class Mixture(nn.Module):
    """One expert a token. `ep`: the ranks that share the experts; `tp`: the ranks that share the
    tokens.

    Args:
        closed: experts that never get a token.
    """

    def __init__(self, closed: Iterable[int] = ()) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts()
        self.ep: dist.ProcessGroup | None = None
        self.tp: DeviceMesh | None = None
        bias = torch.zeros(EXPERTS)
        bias[list(closed)] = -torch.inf
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, choice = (self.router(x) + self.bias).softmax(-1).flatten(0, 1).max(-1)
        tokens = x.flatten(0, 1)
        if self.tp is None:
            out = self._dispatched(tokens, choice)
        else:
            spread = DTensor.from_local(tokens, self.tp, [Replicate()]).redistribute(
                placements=[Shard(0)]
            )
            here = choice.chunk(self.tp.size())[self.tp.get_local_rank()]
            out = DTensor.from_local(self._dispatched(spread.to_local(), here), self.tp, [Shard(0)])
            out = out.redistribute(placements=[Replicate()]).to_local()
        return x + (out * gate[:, None]).view_as(x)

    def _dispatched(self, tokens: Tensor, choice: Tensor) -> Tensor:
        order = choice.argsort(stable=True)
        counts = choice.bincount(minlength=EXPERTS)
        work = self.experts if self.ep is None else functools.partial(self._all_to_all, self.ep)
        return work(tokens[order], counts.tolist())[order.argsort()]

    def _all_to_all(self, ep: dist.ProcessGroup, x: Tensor, counts: list[int]) -> Tensor:
        sent = torch.tensor(counts).view(ep.size(), -1)  # [rank, its expert]
        dist.all_to_all_single(arriving := torch.empty_like(sent), sent, group=ep)
        splits = arriving.sum(1).tolist(), sent.sum(1).tolist()
        here = funcol.all_to_all_single_autograd(x, *splits, ep)
        expert = torch.arange(sent.shape[1]).repeat(ep.size()).repeat_interleave(arriving.flatten())
        order = expert.argsort(stable=True)
        out = self.experts(here[order], arriving.sum(0).tolist())[order.argsort()]
        return funcol.all_to_all_single_autograd(out, *reversed(splits), ep)


class Attention(nn.Module):
    """Attention over the whole sequence, of which each rank of `cp` has a part, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.cp: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (to(y).unflatten(-1, (-1, HEAD_DIM)) for to in (self.q, self.k, self.v))
        if self.cp is not None:
            k, v = (funcol.all_gather_tensor_autograd(t.contiguous(), 1, self.cp) for t in (k, v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


class Model(nn.Module):
    """An embedding, blocks and a head; a stage of a pipeline has a part of them under the same
    names.
    """

    def __init__(self, blocks: Sequence[nn.Module], tied: bool = False) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.head: nn.Module | None = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.embed is not None else x
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) if self.head is not None else x


def make_model(make_blocks: Callable[[], Sequence[nn.Module]], tied: bool = False) -> Model:
    """The same on every rank."""
    torch.manual_seed(2)
    return Model(make_blocks(), tied).double()


def dense_blocks() -> list[nn.Module]:
    return [Block(WIDTH) for _ in range(4)]


def stage_of(model: Model, index: int, num_stages: int) -> Model:
    part = copy.deepcopy(model)
    names = list(model.blocks)[
        index * len(model.blocks) // num_stages : (index + 1) * len(model.blocks) // num_stages
    ]
    part.blocks = nn.ModuleDict({name: part.blocks[name] for name in names})
    part.embed = part.embed if index == 0 else None
    part.head = part.head if index == num_stages - 1 else None
    return part


def tensor_parallel(model: Model, tp: DeviceMesh) -> Model:
    """Column and row parallel, embedding and head by vocabulary; norms, routers and experts stay as
    they are.
    """
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    plan = {name: style for name, style in plan.items() if getattr(model, name) is not None}
    columns, rows = ("up", "q", "k", "v"), ("down", "out")
    for name, block in model.blocks.items():
        if isinstance(block, Mixture):
            block.tp = tp
            continue
        plan |= {f"blocks.{name}.{n}": ColwiseParallel() for n in columns if hasattr(block, n)}
        plan |= {f"blocks.{name}.{n}": RowwiseParallel() for n in rows if hasattr(block, n)}
    return parallelize_module(model, tp, plan)


def fully_sharded(model: Model, mesh: DeviceMesh, **of_root: Any) -> Model:
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, **of_root)
    return fully_shard(model, mesh=mesh, **of_root)


def tokens_and_targets(num_parts: int = 1, part: int = 0) -> tuple[Tensor, Tensor]:
    both = torch.randint(VOCAB, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
    return tuple(half.chunk(num_parts)[part] for half in both)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def whole_gradients(model: Model) -> dict[str, Tensor]:
    """By name, of the whole batch, in one process. A tied weight has one name."""
    tokens, targets = tokens_and_targets()
    loss_of(model(tokens), targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_clip(
    params: Mapping[str, Tensor],
    wholes: Mapping[str, Tensor],
    norm_type: float = 2.0,
    part_of: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
    **where: Any,
) -> None:
    """Clips `params` as the model with the gradients `wholes`, then puts the gradients back.

    Args:
        part_of: what this rank holds, as a plain tensor, of a whole gradient. DTensors are compared
        whole. where: what the Clipper is told of meshes and layouts.
    """
    expected = reference.total_norm(list(wholes.values()), norm_type)
    limit = 0.3 * expected.item()
    before = {name: local(p.grad).clone() for name, p in params.items() if p.grad is not None}
    clipper = distclip.Clipper(list(params.items()), distclip.ClipNorm(limit, norm_type), **where)
    with CommDebugMode() as comms:
        report = clipper.clip_()

    assert bool(report.clipped)
    assert report.coefficient < 0.31
    assert comms.get_total_counts() == 1
    torch.testing.assert_close(report.total_norm.double(), expected, rtol=1e-7, atol=0)
    assert same_bits_everywhere(report.total_norm)
    assert same_bits_everywhere(report.coefficient)
    for name, p in params.items():
        # Other ranks may have a gradient where this one has None: all of them must join in
        # `full_tensor`.
        grad = p.grad if p.grad is not None else torch.zeros_like(p)
        found = grad.full_tensor() if isinstance(grad, DTensor) else grad
        want = (
            part_of(name, wholes[name]) * (limit / expected)
            if name in wholes
            else torch.zeros_like(found)
        )
        torch.testing.assert_close(
            found, want, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
        if name in before:
            local(p.grad).copy_(before[name])


def verify(params: Mapping[str, Tensor], **where: Any) -> None:
    """No false alarm on a layout that is right."""
    distclip.Clipper(list(params.items()), **where).plan.verify()
