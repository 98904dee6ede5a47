"""Stand-ins for the NVIDIA libraries that torch from PyPI is linked to, for machines without a GPU.

torch alone is 2 GB; with the libraries it is 5.5 GB or more. On a machine without a GPU nothing
calls them, but torch does not load without them. Each stand-in has the names that torch looks for.
What torch calls while it is loaded does nothing, what asks for devices answers that there are none,
and any other call ends the process. It needs gcc and readelf.

usage: python -m tests.versions.stand_ins SITE_PACKAGES
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Names of these libraries that torch asks for without a version; any stand-in may have them.
UNVERSIONED = re.compile(r"cu[A-Z]|cu(blas|dnn|file|fft|rand|sparse|solver|da)|nccl|nv")
HOLDS_UNVERSIONED = "libnccl.so.2"

NO_DEVICE = 100  # cudaErrorNoDevice
LOADING = re.compile(r"__cuda(Un)?[Rr]egister")


class Needs(NamedTuple):
    """What the shared objects of torch ask of others."""

    libraries: set[str]
    nodes: dict[str, set[str]]  # library -> the versions of symbols that it must define
    symbols: dict[str, set[str]]  # version of symbols, or "" -> their names


def add_stand_ins(site_packages: Path) -> list[str]:
    """Writes a stand-in beside torch's libraries for each that is missing; returns their names."""
    folder = site_packages / "torch" / "lib"
    objects = [file for file in sorted(folder.iterdir()) if ".so" in file.name]
    needs = _needs_of(objects)
    wheels = site_packages.glob("nvidia/*/lib/*.so*")
    missing = needs.libraries - {file.name for file in [*objects, *wheels]} - _of_the_system()
    for library in sorted(missing):
        _compile(library, needs, folder / library)
    return sorted(missing)


def _needs_of(objects: Iterable[Path]) -> Needs:
    needs = Needs(set(), defaultdict(set), defaultdict(set))
    for file in objects:
        needs.libraries.update(re.findall(r"\(NEEDED\).*\[(.*)\]", _run("readelf", "-d", file)))
        library = ""
        for line in _run("readelf", "-V", "-W", file).splitlines():
            if found := re.search(r"File: (\S+)", line):
                library = found[1]
            elif library and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                needs.nodes[library].add(found[1])
        for line in _run("readelf", "--dyn-syms", "-W", file).splitlines():
            match line.split():
                case [_, _, _, _, "GLOBAL" | "UNIQUE", _, "UND", symbol, *_]:
                    name, _, version = symbol.partition("@")
                    needs.symbols[version.strip("@")].add(name)
    return needs


def _of_the_system() -> set[str]:
    return set(re.findall(r"^\s+(\S+) \(", _run("/sbin/ldconfig", "-p"), re.MULTILINE))


def _compile(library: str, needs: Needs, target: Path) -> None:
    nodes = {node: sorted(needs.symbols[node]) for node in sorted(needs.nodes[library])}
    functions = [_function(name) for names in nodes.values() for name in names]
    if library == HOLDS_UNVERSIONED:
        loose = filter(UNVERSIONED.match, sorted(needs.symbols[""]))
        functions += [f"__attribute__((weak)) {_function(name)}" for name in loose]
    script = [f"{node} {{ global: {_listed(names)} }};" for node, names in nodes.items()]
    with tempfile.TemporaryDirectory() as tmp:
        source, versions = Path(tmp, "stand_in.c"), Path(tmp, "versions.map")
        source.write_text("\n".join(functions) or "int stand_in;")
        versions.write_text("\n".join(script))
        options = [f"-Wl,-soname,{library}"]
        options += [f"-Wl,--version-script={versions}"] if script else []
        _run("gcc", "-shared", "-fPIC", "-w", source, "-o", target, *options)


def _function(name: str) -> str:
    if LOADING.match(name):
        return f"void *{name}(void) {{ return 0; }}"
    if name.startswith("cuda"):
        return f"int {name}(void) {{ return {NO_DEVICE}; }}"
    return f"void {name}(void) {{ __builtin_trap(); }}"


def _listed(names: Iterable[str]) -> str:
    return " ".join(f"{name};" for name in names) or "stand_in;"


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(*add_stand_ins(Path(sys.argv[1])))
