"""Published models as shapes, which simulated ranks shard and `benchmarks.gpu` clips."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Weight:
    """One kind of parameter.

    Attributes:
        tp: the dim that tensor parallelism shards; None: every rank of that axis has a copy.
        expert: dim 0 numbers the experts, which expert parallelism shards.
    """

    name: str
    shape: tuple[int, ...]
    tp: int | None = None
    expert: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


Unit = tuple[Weight, ...]  # one call of `fully_shard`


@dataclass(frozen=True)
class Model:
    """Layers in order, each of one unit or of two: its dense weights and its experts."""

    name: str
    source: str
    embedding: Unit
    layers: tuple[tuple[Unit, ...], ...]
    head: Unit

    def stage(self, index: int, num_stages: int) -> list[Unit]:
        """The units of one pipeline stage; early stages take the layers that are left over."""
        num, rest = divmod(len(self.layers), num_stages)
        begin = index * num + min(index, rest)
        layers = self.layers[begin : begin + num + (index < rest)]
        units = [unit for layer in layers for unit in layer]
        is_first, is_last = index == 0, index == num_stages - 1
        return [self.embedding] * is_first + units + [self.head] * is_last

    @property
    def weights(self) -> list[Weight]:
        return [weight for unit in self.stage(0, 1) for weight in unit]

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)


def _weights(tp: int | None = None, expert: bool = False, **shapes: tuple[int, ...]) -> Unit:
    return tuple(Weight(name, shape, tp, expert) for name, shape in shapes.items())


def _norms(dim: int) -> Unit:
    return _weights(attention_norm=(dim,), ffn_norm=(dim,))


def _gated(name: str, dim: int, hidden: int) -> Unit:
    """Two matrices sharded by columns of the hidden layer, one by rows."""
    wide = {f"{name}_gate": (hidden, dim), f"{name}_up": (hidden, dim)}
    return (*_weights(0, **wide), *_weights(1, **{f"{name}_down": (dim, hidden)}))


def _llama3(
    size: str, dim: int, num_layers: int, ffn: int, head: int = 128, tied: bool = False
) -> Model:
    """8 heads of `head` elements for keys and values; no biases. Tied: without an output matrix."""
    qkv = _weights(0, wq=(dim, dim), wk=(8 * head, dim), wv=(8 * head, dim))
    layer = (*_norms(dim), *qkv, *_weights(1, wo=(dim, dim)), *_gated("ffn", dim, ffn))
    shape = f"{num_layers} layers, width {dim}, 8 kv heads of {head}, ffn {ffn}"
    return Model(
        f"Llama-3 {size}",
        f"{shape}, vocabulary 128256 (arXiv:2407.21783)",
        _weights(0, embedding=(128_256, dim)),
        ((layer,),) * num_layers,
        _weights(last_norm=(dim,)) + (() if tied else _weights(0, output=(128_256, dim))),
    )


def _mixture256() -> Model:
    """DeepSeek-V3 without its multi-token prediction; no gradient trains the router's bias.

    Latent attention: 128 heads with queries of 128 + 64 elements and values of 128, over latents
    of 1536 and 512.
    """
    dim, num, width = 7168, 256, 2048
    q = _weights(q_a=(1536, dim), q_norm=(1536,)) + _weights(0, q_b=(128 * (128 + 64), 1536))
    kv = _weights(kv_a=(576, dim), kv_norm=(512,)) + _weights(0, kv_b=(128 * (128 + 128), 512))
    attention = (*_norms(dim), *q, *kv, *_weights(1, wo=(dim, 128 * 128)))
    dense = (*attention, *_gated("ffn", dim, 18_432))
    routed = (*attention, *_weights(router=(num, dim)), *_gated("shared", dim, width))
    wide = {"experts_gate": (num, width, dim), "experts_up": (num, width, dim)}
    experts = _weights(expert=True, **wide, experts_down=(num, dim, width))
    parts = "the last 58 with 256 routed experts of 2048 and a shared one"
    return Model(
        "mixture of 256",
        f"DeepSeek-V3: 61 layers, {parts} (arXiv:2412.19437)",
        _weights(0, embedding=(129_280, dim)),
        ((dense,),) * 3 + ((routed, experts),) * 58,
        _weights(last_norm=(dim,)) + _weights(0, output=(129_280, dim)),
    )


LLAMA_1B = _llama3("1B", 2048, 16, 8192, head=64, tied=True)  # of Llama 3.2
LLAMA_8B = _llama3("8B", 4096, 32, 14_336)
LLAMA_70B = _llama3("70B", 8192, 80, 28_672)
LLAMA_405B = _llama3("405B", 16_384, 126, 53_248)
MIXTURE = _mixture256()
