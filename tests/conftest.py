from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import Ranks

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

with contextlib.suppress(ImportError):  # a machine with a GPU may have no hypothesis
    import hypothesis

    # Other processes may hold the CPU for long.
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")

SHARED_POOLS = ("four_ranks", "four_on_cpus", "eight_ranks")
# Frameworks change the processes that load them.
OWN_POOLS = (
    *("two_engine_ranks", "four_engine_ranks", "four_megatron_ranks", "four_titan_ranks"),
    *("two_lightning_ranks", "two_accelerated_ranks"),
)
FOLDER = Path(__file__).parent
STARTS_PROCESSES = ("launch", "benchmarks", "slurm", "parity", "test_docs.py", "test_examples.py")
# Their tests share no fixture and compile nothing: each may run on any test worker.
APART = ("benchmarks", "test_docs.py", "test_examples.py")

_pools: dict[tuple[int, str], Ranks] = {}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """A machine with a GPU may have no pytest-timeout, whose option pyproject.toml sets."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "not kept without pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): not kept without pytest-timeout")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker takes all files with tests on a shared pool: one pool of a size for the whole run.

    The others take the rest by file, because two workers on one file would make its fixtures twice,
    and the adapters' by framework, whose ranks take seconds to import it.
    (pytest-xdist 3.8 ignores its own `xdist_group` under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = config.rootpath / nodeid.partition("::")[0]
            if _shares_pool(path):
                return "ranks"
            if _is_below(path, ("adapters",)):
                return "adapters " + path.stem.split("_")[1]
            return nodeid if _is_below(path, APART) else str(path)

    config.option.loadscopereorder = False  # the order below instead
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end of a run, workers without a test wait for the last one."""
    for item in items:
        pools = {*SHARED_POOLS, *OWN_POOLS} & set(getattr(item, "fixturenames", ()))
        if pools or _is_below(item.path, STARTS_PROCESSES):
            item.add_marker(pytest.mark.ranks)
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, bool]:
    return not _shares_pool(item.path), not item.get_closest_marker("ranks")


@functools.cache
def _shares_pool(path: Path) -> bool:
    words = (*SHARED_POOLS, "from tests.conftest import pool")
    return path.is_relative_to(FOLDER) and any(word in path.read_text() for word in words)


def _is_below(path: Path, names: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(FOLDER / name) for name in names)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests on shared pools come first: after them the pools only take time from the others."""
    if not _shares_pool(item.path):
        _stop_pools()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # later collections, of which some tests ask for many, leave out modules and tests


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="no CUDA device on this machine"
                ),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Every test on ranks runs on gloo; and on CUDA tensors, over NCCL if each rank has a GPU."""
    return request.param


@pytest.fixture
def four_ranks(device: str) -> Ranks:
    return pool(4, device)


@pytest.fixture(scope="session")
def four_on_cpus() -> Ranks:
    """For what only a CPU does."""
    return pool(4)


@pytest.fixture(scope="session")
def eight_ranks() -> Ranks:
    """For three dimensions. On CPUs: gloo cannot send between pipeline stages on one GPU."""
    return pool(8)


def pool(size: int, device: str = "cpu") -> Ranks:
    return _pools.setdefault((size, device), Ranks(size, device))


@pytest.fixture(scope="module")
def on_accelerator() -> Iterator[Any]:
    """A process that has the device of tests/support/accelerator.py."""
    yield from _accelerators(1)


@pytest.fixture(scope="module")
def on_two_accelerators() -> Iterator[Any]:
    """Two ranks."""
    yield from _accelerators(2)


def _accelerators(size: int) -> Iterator[Any]:
    from tests.support.accelerator import running  # its imports take a second

    yield from running(size)


@pytest.fixture(scope="session", autouse=True)
def _pools_end() -> Iterator[None]:
    yield
    _stop_pools()


def _stop_pools() -> None:
    for ranks in _pools.values():
        ranks.stop()
