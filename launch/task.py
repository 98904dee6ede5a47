"""What is learnt: to predict the next byte of a text, by a small GPT or LSTM.

Each layout can shard a model by its `blocks`.
"""

import random
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.ranks import UserError

VOCABULARY = 256
HEADS = 4
ROTATION_BASE = 10_000.0
# Not Python's own text: other people's packages, compiled files, test data in odd encodings.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib-dynload")
}
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Corpus:
    """The text.

    Shapes: `data` is [num_bytes], uint8, on the CPU, the same on every rank.
    """

    data: Tensor
    source: str
    num_files: int
    checksum: int

    def batch(self, seed: int, step: int, size: int, context: int, corrupt: float = 0.0) -> Tensor:
        """The sequences of a step: a function of (seed, step), so that a resumed run has the same.

        A share `corrupt` of the steps has random bytes, as of a broken file.

        Shapes: [size, context + 1], int64; inputs are all but the last byte, targets all but the
        first.
        """
        # random hashes a string seed with SHA-512: neighbouring steps and seeds are independent.
        draw = random.Random(f"{seed}/{step}")
        if random.Random(f"{seed}/{step}/corrupt").random() < corrupt:
            noise = torch.Generator().manual_seed(draw.getrandbits(63))
            return torch.randint(256, (size, context + 1), generator=noise)
        last = len(self.data) - context - 1
        starts = [draw.randint(0, last) for _ in range(size)]
        return torch.stack([self.data[start : start + context + 1] for start in starts]).long()


def read_corpus(folder: Path | None, context: int) -> Corpus:
    """The text under `folder`, or the standard library's source; at most 64 MiB, sorted by path."""
    source = str(folder) if folder else "Python's standard library"
    chunks, num_bytes = [], 0
    for path in _text_files(folder) if folder else _library_files():
        chunk = _read(path)
        if chunk and b"\0" not in chunk:
            chunks.append(chunk[: MAX_BYTES - num_bytes])
            num_bytes += len(chunks[-1])
        if num_bytes == MAX_BYTES:
            break
    text = b"".join(chunks)
    if len(text) < context + 2:
        raise UserError(
            f"--data {source}: {len(text)} bytes of text in it, and a sequence takes {context + 2}"
        )
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    return Corpus(data, source, len(chunks), zlib.crc32(text))


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        reason = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--data {folder}: {reason}")
    paths = folder.rglob("*")
    visible = (path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}")
    return sorted(path for path in visible if path.is_file())


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = root.rglob("*.py")
    return sorted(p for p in paths if SKIPPED_FOLDERS.isdisjoint(p.relative_to(root).parts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read: {error.strerror}") from None


class Attention(nn.Module):
    """Causal self-attention with rotary positions, because a table of them would need sharding."""

    def __init__(self, width: int):
        super().__init__()
        self.head_dim = width // HEADS
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        query, key = _rotate(query), _rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        # -1 instead of the number of heads: with tensor parallelism a rank holds some of them.
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotate(x: Tensor) -> Tensor:
    """Turns pairs of entries by an angle that grows with the position.

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.
    """
    length, head_dim = x.shape[-2:]
    exponents = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=x.device, dtype=torch.float32)
    angles = positions[:, None] * ROTATION_BASE**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One layer of the GPT, normalised before each half."""

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Bytes to logits of the next byte.

    Shapes: [batch, context] int64 to [batch, context, 256].
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_start_small)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _start_small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class LSTM(nn.Module):
    """Bytes to logits of the next byte; the state starts at zero for every sequence.

    Shapes: [batch, context] int64 to [batch, context, 256].
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([nn.LSTM(width, width, depth, batch_first=True)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.blocks[0](self.embed(tokens))
        return self.head(x)


def build_model(*, model: str, width: int, depth: int, precision: str, seed: int) -> nn.Module:
    """A model whose weights depend on the seed alone: every rank starts with the same."""
    torch.manual_seed(seed)
    if model == "lstm" and precision != "fp32":
        # oneDNN has an LSTM in bf16 and fp16 for newer CPUs; on others it raises.
        torch.backends.mkldnn.set_flags(False)
    return GPT(width, depth) if model == "gpt" else LSTM(width, depth)
