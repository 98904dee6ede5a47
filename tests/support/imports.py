"""What the modules of a package use of each other and of torch, read from their source.

Imports inside functions and under `if TYPE_CHECKING` count as any other. A name that a package's
`__init__.py` only passes on is a use of the module that defines it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PRIVATE = re.compile(
    r"_(?!_|distclip_)\w+"
)  # `_distclip_...`: what distclip leaves on torch's objects
NAMEDTUPLE = {
    "_asdict",
    "_field_defaults",
    "_fields",
    "_make",
    "_replace",
}  # public despite the `_`
IMPORTERS = ("import_module", "__import__")
DOTTED = re.compile(r"\w+(\.\w+)*")


class Use(NamedTuple):
    """A dotted name, from the top-level package on; it starts with "." where no import binds it."""

    line: int
    name: str


class PrivateUse(NamedTuple):
    line: int
    name: str
    own: bool  # an attribute of `self` or `cls`


class Module:
    """One file. `imports` maps each name that an import binds to the dotted name behind it."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.is_package = path.name == "__init__.py"
        self.nodes = list(ast.walk(ast.parse(path.read_text())))
        self.imports: dict[str, str] = {}
        self.uses = [*self._imported(), *self._attributes()]

    def _imported(self) -> Iterator[Use]:
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield Use(node.lineno, name.name)
                    bound = name.name if name.asname else name.name.partition(".")[0]
                    self.imports[name.asname or bound] = bound
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                for name in node.names:
                    yield Use(node.lineno, f"{base}.{name.name}")
                    self.imports[name.asname or name.name] = f"{base}.{name.name}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
                yield from (
                    Use(node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant)
                )

    def _base(self, node: ast.ImportFrom) -> str:
        """The module after `from`."""
        if not node.level:
            return node.module or ""
        parents = self.name.split(".")[: None if self.is_package else -1]
        parents = parents[: len(parents) + 1 - node.level]
        return ".".join([*parents, node.module] if node.module else parents)

    def _attributes(self) -> Iterator[Use]:
        for node in self.nodes:
            if isinstance(node, ast.Attribute):
                root, _, rest = ast.unparse(node).partition(".")
                yield Use(node.lineno, f"{self.imports.get(root, '')}.{rest}")


class Package:
    """All modules below the folder `root`, by their dotted names; `name` is the package's own."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.modules = {module: Module(module, path) for module, path in _files(root, name)}

    def owner(self, name: str) -> tuple[str, str]:
        """The module of this package that defines the dotted `name`, and the rest of the name."""
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        module = next((prefix for prefix in prefixes if prefix in self.modules), "")
        rest = name[len(module) + 1 :]
        first, _, attributes = rest.partition(".")
        if module and self.modules[module].is_package and first in self.modules[module].imports:
            source = self.modules[module].imports[first]
            if source != f"{module}.{first}" and self.owner(source)[0]:
                return self.owner(f"{source}.{attributes}".rstrip("."))
        return module, rest

    @cached_property
    def arrows(self) -> dict[str, dict[str, int]]:
        """For each module the modules that it uses, each with the line of the first use."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.modules}
        for name, module in self.modules.items():
            for use in sorted(module.uses):
                target, _ = self.owner(use.name)
                if target and target != name:
                    found[name].setdefault(target, use.line)
        return found

    def cycle(self) -> list[str]:
        """Modules of which each uses the next; the last is the first again. Or nothing."""
        try:
            TopologicalSorter(self.arrows).prepare()
        except CycleError as error:
            return error.args[1][::-1]
        return []

    def private_names(self) -> Iterator[tuple[str, PrivateUse]]:
        """(module, use) of every `x._y` that the module, or for `self._y` the package, lacks."""
        defined = {name: set(_definitions(module)) for name, module in self.modules.items()}
        anywhere = set[str]().union(*defined.values())
        for name, module in self.modules.items():
            for use in _private(module):
                if use.name not in (anywhere if use.own else defined[name]):
                    yield name, use


def _files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        parts = [name, *path.relative_to(root).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _definitions(module: Module) -> Iterator[str]:
    """Functions, classes, arguments, variables and attributes of `self`."""
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node):
            yield node.attr


def _private(module: Module) -> Iterator[PrivateUse]:
    for node in module.nodes:
        own = isinstance(node, ast.Attribute) and _is_own(node)
        for part in _dotted(node).split("."):
            if PRIVATE.fullmatch(part) and part not in NAMEDTUPLE:
                yield PrivateUse(node.lineno, part, own)


def _dotted(node: ast.AST) -> str:
    """The name that a node takes from elsewhere, as a string too: `getattr(x, "_y")`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.alias):
        return node.name
    if isinstance(node, ast.ImportFrom):
        return node.module or ""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text and DOTTED.fullmatch(node.value) else ""


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
