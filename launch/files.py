"""Files of a run: errors of the system as one line, and writes that outlive a power cut."""

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from launch.ranks import UserError

CHUNK = 1 << 20


@contextlib.contextmanager
def errors_as(what: str) -> Iterator[None]:
    """Turns an OSError into a UserError: `what`, the file, and the reason of the system."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {describe(error)}") from None


def describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def one_line(value: object) -> str:
    """What a file says, as text that is safe to print: escaped, and at most 300 characters."""
    text = str(value)
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def write_synced(path: Path, text: str) -> None:
    """Writes a file that is on the disk when this returns; its name is not: sync the folder."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Puts what a file holds on the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The CRC-32 of a file, as text."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"
