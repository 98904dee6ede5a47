"""Reads DCP checkpoints without executing what is in them.

torch unpickles `.metadata` and every value that is no tensor, and a pickle can call any function.
Here `.metadata` may name the classes of DCP alone, and values what `weights_only=True` allows.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import ReadItem

from launch.files import errors_as
from launch.ranks import UserError, on_rank_0

METADATA = ".metadata"
# What torch 2.4 to 2.13 write.
NAMES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}


class SafeReader(FileSystemReader):
    """The reader of one checkpoint, whose metadata rank 0 reads for all ranks.

    Collective: every rank must make it.

    Raises:
        UserError: on every rank, where the metadata is damaged, or names what it should not.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = on_rank_0(lambda: _read_metadata(folder / METADATA))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class SafePlanner(DefaultLoadPlanner):
    """Loads numbers, strings, tensors, and lists and dicts of them; raises at anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The base class executes what it is given: it gets a pickle of what was read safely.
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _read_metadata(path: Path) -> Metadata:
    with errors_as("no metadata"):
        data = path.read_bytes()
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # bytes that are no pickle raise errors of any kind
        reason = str(error) or type(error).__name__
        raise UserError(f"{path.name} cannot be read: {reason.splitlines()[0]}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path.name} holds no metadata of a checkpoint")
    return metadata
