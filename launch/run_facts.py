"""run.json, written last into a checkpoint: of which run and step it is, and of which files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from launch.files import checksum, errors_as, one_line, sync, write_synced
from launch.ranks import UserError

NAME = "run.json"
STEP, FILES = "step", "files"


def write(folder: Path, step: int, facts: Mapping[str, Any], checksums: Mapping[str, str]) -> None:
    """Puts it on the disk, together with the names in the folder."""
    all_facts = {STEP: step, **facts, FILES: dict(sorted(checksums.items()))}
    write_synced(folder / NAME, json.dumps(all_facts, indent=1))
    sync(folder)


def read(folder: Path, step: int, facts: Mapping[str, Any]) -> dict[str, str] | str:
    """The checksums in it, or why it is damaged.

    Raises:
        UserError: it is of a run with other `facts`.
    """
    try:
        saved = json.loads((folder / NAME).read_text())
    except OSError as error:
        return f"its {NAME}: {error.strerror}"
    except (ValueError, RecursionError):
        return f"its {NAME} is damaged"
    if not isinstance(saved, dict):
        return f"its {NAME} is damaged"
    if missing := [name for name in (STEP, *facts) if name not in saved]:
        return f"its {NAME} lacks {missing[0]}"
    if type(saved[STEP]) is not int or saved[STEP] != step:
        return f"its {NAME} is of step {one_line(saved[STEP])}"
    for name, value in facts.items():
        if saved[name] != value:
            raise UserError(
                f"checkpoint {folder} is of a run with {name} {one_line(saved[name])} and this one "
                f"has {name} {value}: use the same, or another --out"
            )
    found = saved.get(FILES, {})  # checkpoints of earlier versions have none
    is_known = isinstance(found, dict) and all(map(_lies_inside, found))
    return found if is_known else f"its {NAME} is damaged"


def _lies_inside(name: str) -> bool:
    """Whether it names a file in the folder: another, such as a device, may never end."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def names_in(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Those of this rank's share of the files: each rank reads some of them."""
    share = names[dist.get_rank() :: dist.get_world_size()]
    with errors_as("a file cannot be read"):
        return {name: checksum(folder / name) for name in share}


def compare(folder: Path, expected: Mapping[str, str]) -> None:
    """Raises UserError where a file in this rank's share is not as it was written."""
    for name, found in checksums(folder, sorted(expected)).items():
        if found != expected[name]:
            raise UserError(f"{name} is not as it was written")
