"""Two small byte-level language models: a GPT and an LSTM, of which each layout can shard the `blocks`."""

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256
HEAD_DIM_BASE = 10_000.0


class Attention(nn.Module):
    """Causal self-attention with rotary positions, so that no table of positions has to be sharded."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        query, key = _rotate(query), _rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        # -1 and not the number of heads: under tensor parallelism a rank holds only some of them.
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Turns pairs of entries by an angle that grows with the position (Su et al. 2021, arXiv:2104.09864)."""
    length, head_dim = x.shape[-2:]
    rates = HEAD_DIM_BASE ** -(torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One layer of the GPT, normalised before each half."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Bytes to logits of the next byte.

    Shapes: [batch, context] int64 to [batch, context, 256].
    """

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_small_weights)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _small_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class LSTM(nn.Module):
    """Bytes to logits of the next byte, from a zero state for every sequence.

    Shapes: [batch, context] int64 to [batch, context, 256].
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([nn.LSTM(width, width, depth, batch_first=True)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.blocks[0](self.embed(tokens))
        return self.head(x)


def build(*, model: str, width: int, depth: int, heads: int, precision: str, seed: int) -> nn.Module:
    """A model whose weights depend on the seed alone: every rank starts from the same ones."""
    torch.manual_seed(seed)
    if model == "lstm" and precision != "fp32":
        # oneDNN has an LSTM in bf16 and fp16 for newer CPUs only, and on the others fails instead of stepping aside.
        torch.backends.mkldnn.set_flags(False)
    return GPT(width, depth, heads) if model == "gpt" else LSTM(width, depth)
