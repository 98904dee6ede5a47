"""Small changes to the code, one at a time, as cosmic-ray makes them; drawn by a seed."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

Position = tuple[int, int]  # line, counted from 1, and column


class Mutant(NamedTuple):
    """One change.

    Attributes:
        operator: cosmic-ray's name of the kind of change.
        occurrence: which of the places in the file that the operator finds.
    """

    path: str
    line: int
    operator: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.operator.removeprefix('core/')}#{self.occurrence}"

    def code(self, source: str) -> str:
        return str(mutate_code(source, get_operator(self.operator)(), self.occurrence))

    def difference(self, source: str) -> str:
        lines = difflib.unified_diff(source.splitlines(), self.code(source).splitlines(), n=0)
        return "\n".join([*lines][3:])


def sample(root: Path, paths: Sequence[str], num: int, seed: int) -> list[Mutant]:
    """`num` mutants in different places of the code, each place as likely as another.

    One operator is drawn for each place: a `*` has eleven others, a `not` one.
    """
    drawn = random.Random(seed)
    places: dict[tuple[str, Position], list[Mutant]] = {}
    for path in paths:
        for position, mutant in mutants(path, (root / path).read_text()):
            places.setdefault((path, position), []).append(mutant)
    order = sorted(places)
    drawn.shuffle(order)  # a longer sample begins with the shorter one
    return [drawn.choice(places[each]) for each in order[:num]]


def mutants(path: str, source: str) -> Iterator[tuple[Position, Mutant]]:
    """All that change what the code does: none in annotations and in the words of messages."""
    silent = [*_silent_ranges(ast.parse(source))]
    nodes = [*ast_nodes(get_ast(source))]
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments():
            continue
        found = (each for node in nodes for each in operator().mutation_positions(node))
        for occurrence, (start, _) in enumerate(found):
            if not any(first <= start < last for first, last in silent):
                yield start, Mutant(path, start[0], name, occurrence)


def _silent_ranges(tree: ast.Module) -> Iterator[tuple[Position, Position]]:
    """Annotations, which nothing evaluates; f-strings; what only type checkers run; `strict=True`
    of `zip`, which says what is known, as an assert does.
    """
    for node in ast.walk(tree):
        silent: ast.AST | None = None
        if isinstance(node, ast.arg | ast.AnnAssign):
            silent = node.annotation
        elif isinstance(node, ast.FunctionDef):
            silent = node.returns
        elif isinstance(node, ast.JoinedStr) or _is_for_type_checkers(node):
            silent = node
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            silent = node.value
        if isinstance(silent, ast.expr | ast.stmt):
            end = (silent.end_lineno or 0, silent.end_col_offset or 0)
            yield (silent.lineno, silent.col_offset), end


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
