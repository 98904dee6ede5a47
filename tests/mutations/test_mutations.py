"""The tool itself, on a small project: what is changed, what a test sees, what it does not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")

from tests.mutations.__main__ import summary
from tests.mutations.covering import Covering, measure
from tests.mutations.mutants import Mutant, mutants, sample
from tests.mutations.run import Stage, Tree, outcome

CODE = '''
from __future__ import annotations

def larger(a: int | None, b: int = 1 + 1) -> int | None:
    """1 + 1"""
    if a is None:
        raise ValueError(f"{b + 1} is alone")
    count = 0
    while count < b:
        count += 1
    ((found, _),) = zip([a if a > count else count], [0], strict=True)
    return found

def on_a_rank(a: int) -> int:
    return a + 1
'''
TESTS = """
from distclip.numbers import larger

def test_larger() -> None:
    assert larger(1, 2) == 2
    assert larger(3, 2) == 3

def test_default() -> None:
    assert larger(1) == 2
"""
TESTS_ON_RANKS = """
import pytest
from distclip.numbers import on_a_rank
from tests.support.ranks import Ranks

@pytest.mark.ranks
def test_on_a_rank() -> None:
    ranks = Ranks(1)
    assert ranks.run(on_a_rank, 1) == [2]
    ranks.stop()
"""
PATH = "distclip/numbers.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    source = tmp_path_factory.mktemp("source")
    here = Path(__file__).parents[2]
    copied = [
        *("tests/mutations/server.py", "tests/mutations/contexts.py"),
        *("tests/support/ranks.py", "tests/support/measured_ranks.py"),
    ]
    files = {
        "distclip/__init__.py": "",
        PATH: CODE,
        "tests/__init__.py": "",
        "tests/test_numbers.py": TESTS,
        "tests/test_on_ranks.py": TESTS_ON_RANKS,
        "tests/mutations/__init__.py": "",
        "tests/support/__init__.py": "",
        **{name: (here / name).read_text() for name in copied},
        "pytest.ini": "[pytest]\nmarkers = ranks\n",
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=source, check=True)
    tree = Tree(source, tmp_path_factory.mktemp("tree"))
    yield tree
    tree.stop()


def the(operator: str, line: int) -> Mutant:
    return next(m for _, m in mutants(PATH, CODE) if (m.operator, m.line) == (operator, line))


def test_what_changes_nothing_is_not_drawn() -> None:
    lines = {mutant.line for _, mutant in mutants(PATH, CODE)}
    assert lines == {4, 6, 8, 9, 10, 11, 15}  # the default in 4; no message, no docstring
    assert not any("True" in m.operator for _, m in mutants(PATH, CODE))
    of_the_first = [m for _, m in mutants(PATH, CODE) if m.line == 4]
    assert {m.operator.split("_")[0] for m in of_the_first} == {
        "core/NumberReplacer",
        "core/ReplaceBinaryOperator",
    }
    assert all("BitOr_" not in m.operator for m in of_the_first)  # an annotation


def test_places_are_drawn_once(tree: Tree) -> None:
    drawn = sample(tree.root, [PATH], 1000, 0)
    places = {start for start, _ in mutants(PATH, CODE)}
    assert len(drawn) == len(places)
    assert drawn[:3] == sample(tree.root, [PATH], 3, 0)
    assert drawn != sample(tree.root, [PATH], 1000, 1)


def test_mutants_are_killed_or_survive(tree: Tree, tmp_path: Path) -> None:
    measure(tree.root, tmp_path / "coverage", ["tests"])
    covering = Covering(tree.root, tmp_path / "coverage")
    both = ["tests/test_numbers.py::test_default", "tests/test_numbers.py::test_larger"]
    assert covering.tests(PATH, 9) == (both, [])
    assert sorted(covering.tests(PATH, 4).alone) == both  # it runs at the import
    assert sorted(covering.tests(PATH, 7).alone) == both  # no test runs it
    of_rank = ["tests/test_on_ranks.py::test_on_a_rank"]
    assert covering.tests(PATH, 15) == ([], of_rank)

    def of(mutant: Mutant) -> str | None:
        alone, on_ranks = covering.tests(PATH, mutant.line)
        stages = [Stage("one process", ["-m", "not ranks"], alone), Stage("ranks", [], on_ranks)]
        found = outcome(tree, mutant, stages, 60.0)
        assert (tree.root / PATH).read_text() == CODE
        return found.killed_by

    assert of(the("core/ReplaceComparisonOperator_Gt_Lt", 11)) == "one process"
    assert of(the("core/ReplaceComparisonOperator_Gt_GtE", 11)) is None  # the same number
    assert of(the("core/ReplaceBinaryOperator_Add_Mul", 4)) == "one process"  # the default, 1
    assert of(the("core/ReplaceBinaryOperator_Add_Mul", 15)) == "ranks"
    assert covering.names() == [*both, *of_rank]
    assert tree.run([*both, *of_rank], 60.0) == 0


def test_what_does_not_end_is_killed(tree: Tree) -> None:
    _, endless = next(each for each in mutants(PATH, CODE) if "count += 0" in each[1].code(CODE))
    found = outcome(tree, endless, [Stage("one process", [], ["tests/test_numbers.py"])], 5.0)
    assert found.killed_by == "time"
    text = summary([found, found._replace(killed_by=None)])
    assert text.endswith("2 mutants, 1 killed (50.0%)")
    assert "+        count += 0" in text
