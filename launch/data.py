"""Text as one long row of bytes, and the batch that belongs to a step."""

import random
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ranks import UserError

# Not Python's own text: other people's packages, compiled files, and test data with odd encodings.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib-dynload"}
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Corpus:
    """The bytes to learn.

    Shapes: `data` is [num_bytes], uint8, on the CPU, the same on every rank.
    """

    data: torch.Tensor
    source: str
    num_files: int
    checksum: int

    def batch(self, seed: int, step: int, size: int, context: int) -> torch.Tensor:
        """The sequences of a step: a function of (seed, step) alone, so that resuming needs only the step.

        Shapes: [size, context + 1], int64; inputs are all but the last byte, targets all but the first.
        """
        # A string seed goes through SHA-512: neighbouring steps and seeds share nothing.
        draw = random.Random(f"{seed}/{step}")
        last = len(self.data) - context - 1
        rows = [self.data[start : start + context + 1] for start in (draw.randint(0, last) for _ in range(size))]
        return torch.stack(rows).long()


def read_corpus(folder: Path | None, context: int) -> Corpus:
    """The text under `folder`, or the standard library's source files; at most 64 MiB, in the order of the paths."""
    paths = _text_files(folder) if folder else _library_files()
    source = str(folder) if folder else "Python's standard library"
    chunks, num_bytes = [], 0
    for path in paths:
        chunk = _read(path)
        if chunk and b"\0" not in chunk:
            chunks.append(chunk[: MAX_BYTES - num_bytes])
            num_bytes += len(chunks[-1])
        if num_bytes == MAX_BYTES:
            break
    text = b"".join(chunks)
    if len(text) < context + 2:
        raise UserError(f"--data {source}: {len(text)} bytes of text in it, and a sequence takes {context + 2}")
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    return Corpus(data, source, len(chunks), zlib.crc32(text))


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    inside = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return sorted(path for path in inside if path.is_file())


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return sorted(found)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read: {error.strerror}") from None
