from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import Jobs, Undisturbed
from tests.slurm.machines import Machines
from tests.slurm.machines import why_not as why_no_machines


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes. Each test worker has its own cluster, which has no name on the real machine."""
    reason = why_not()
    if reason:
        pytest.skip(f"no SLURM cluster: {reason}")
    # Not pytest's own folder: a unix socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def jobs(
    cluster: Cluster, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Jobs]:
    """Submits jobs; all of them are gone and all nodes back when the test is over."""
    jobs = Jobs(cluster, text, tmp_path)
    yield jobs
    report = request.node.stash.get(FAILED, False)
    cluster.repair()
    if report:
        print(jobs.logs())


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for module in (json, subprocess):
        source = Path(module.__file__ or "")
        (folder / source.name).write_text(source.read_text())
    return folder


@pytest.fixture(scope="session")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run of two ranks to which every disturbed one has to be equal."""
    return Undisturbed(text, tmp_path_factory)


@pytest.fixture
def hosts() -> Iterator[Machines]:
    """Two machines without SLURM."""
    reason = why_no_machines()
    if reason:
        pytest.skip(f"no machines: {reason}")
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        machines = Machines(Path(folder), 2)
        try:
            yield machines
        finally:
            machines.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes minutes, unless -m speaks of it."""
    if "cluster_slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("cluster_slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-slurm"))
