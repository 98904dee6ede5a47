"""The parameters of published models, as shapes: what `scale.py` lays out on thousands of simulated ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod


@dataclass(frozen=True)
class Weight:
    """One kind of parameter.

    Attributes:
        tp: the dim that tensor parallelism cuts; None: every rank of that axis has a copy.
        expert: dim 0 numbers the experts, which expert parallelism cuts.
    """

    name: str
    shape: tuple[int, ...]
    tp: int | None = None
    expert: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


Unit = tuple[Weight, ...]  # what `fully_shard` is called on at a time


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
        each, over = divmod(len(self.layers), num_stages)
        begin = index * each + min(index, over)
        here = [unit for layer in self.layers[begin : begin + each + (index < over)] for unit in layer]
        return [self.embedding] * (index == 0) + here + [self.head] * (index == num_stages - 1)

    @property
    def numel(self) -> int:
        return sum(weight.numel for unit in self.stage(0, 1) for weight in unit)


def _ends(dim: int, vocabulary: int) -> tuple[Unit, Unit]:
    """The embedding, and the last norm with an output matrix of its own: both matrices are cut by rows."""
    head = Weight("last_norm", (dim,)), Weight("output", (vocabulary, dim), tp=0)
    return (Weight("embedding", (vocabulary, dim), tp=0),), head


def _gated(name: str, dim: int, hidden: int) -> Unit:
    """A gated feed-forward block: two matrices cut by columns of its hidden layer, one by rows."""
    wide, back = (hidden, dim), (dim, hidden)
    return Weight(f"{name}_gate", wide, tp=0), Weight(f"{name}_up", wide, tp=0), Weight(f"{name}_down", back, tp=1)


def _norms(dim: int) -> Unit:
    return Weight("attention_norm", (dim,)), Weight("ffn_norm", (dim,))


def _llama3(size: str, dim: int, num_layers: int, ffn: int, head: int = 128, tied: bool = False) -> Model:
    """Heads of `head` elements, 8 of them for keys and values; no biases. Tied: no output matrix of its own."""
    queries = Weight("wq", (dim, dim), tp=0)
    keys_values = Weight("wk", (8 * head, dim), tp=0), Weight("wv", (8 * head, dim), tp=0)
    layer = (*_norms(dim), queries, *keys_values, Weight("wo", (dim, dim), tp=1), *_gated("ffn", dim, ffn))
    embedding, (norm, output) = _ends(dim, 128_256)
    source = f"{num_layers} layers, width {dim}, 8 kv heads of {head}, ffn {ffn}, vocabulary 128256 (arXiv:2407.21783)"
    last = (norm,) if tied else (norm, output)
    return Model(f"Llama-3 {size}", source, embedding, ((layer,),) * num_layers, last)


def _latent_attention(dim: int) -> Unit:
    """128 heads with queries of 128 + 64 elements and values of 128, over latents of 1536 and 512."""
    queries = Weight("q_a", (1536, dim)), Weight("q_norm", (1536,)), Weight("q_b", (128 * (128 + 64), 1536), tp=0)
    others = Weight("kv_a", (512 + 64, dim)), Weight("kv_norm", (512,)), Weight("kv_b", (128 * (128 + 128), 512), tp=0)
    return (*_norms(dim), *queries, *others, Weight("wo", (dim, 128 * 128), tp=1))


def _mixture256() -> Model:
    """DeepSeek-V3 without its multi-token prediction module; the router's bias is no trained parameter."""
    dim, num_experts, width = 7168, 256, 2048
    attention = _latent_attention(dim)
    dense = (*attention, *_gated("ffn", dim, 18_432))
    routed = (*attention, Weight("router", (num_experts, dim)), *_gated("shared", dim, width))
    expert = partial(Weight, expert=True)
    wide, back = (num_experts, width, dim), (num_experts, dim, width)
    experts = expert("experts_gate", wide), expert("experts_up", wide), expert("experts_down", back)
    embedding, head = _ends(dim, 129_280)
    source = "DeepSeek-V3: 61 layers, the last 58 with 256 routed experts of 2048 and a shared one (arXiv:2412.19437)"
    return Model("mixture of 256", source, embedding, ((dense,),) * 3 + ((routed, experts),) * 58, head)


LLAMA_1B = _llama3("1B", 2048, 16, 8192, head=64, tied=True)  # of Llama 3.2
LLAMA_8B = _llama3("8B", 4096, 32, 14_336)
LLAMA_70B = _llama3("70B", 8192, 80, 28_672)
LLAMA_405B = _llama3("405B", 16_384, 126, 53_248)
MIXTURE = _mixture256()
