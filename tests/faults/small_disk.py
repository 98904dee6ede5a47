"""A disk that is soon full: a tmpfs, which takes root to mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

BALLAST = "ballast"


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), "64k"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mounts one at the folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, free: int) -> None:
    """Leaves so many bytes of the disk."""
    left = shutil.disk_usage(folder).free - free
    with (folder / BALLAST).open("ab") as file:
        if left > 0:
            os.posix_fallocate(file.fileno(), 0, left)


def drop_ballast(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)
