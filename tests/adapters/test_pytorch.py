"""distclip behind torch's functions: who calls them, by which names, what they return."""

from __future__ import annotations

import functools
import math
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as imported_before
from torch.nn.utils.clip_grad import clip_grad_norm_ as from_the_module

import distclip
from distclip.adapters import replacing_torch
from tests.adapters.test_torchtitan import DEGREES, dims_of, parameters
from tests.support import reference
from tests.support.ranks import Ranks, same_bits_everywhere
from tests.support.tolerances import NORM

ROOT = Path(__file__).parents[2]
GRADIENT = torch.tensor([10.0, 20.0, 30.0])


def a_parameter() -> nn.Parameter:
    param = nn.Parameter(torch.zeros(3))
    param.grad = GRADIENT.clone()
    return param


class ATrainer:
    clip = staticmethod(imported_before)


def through_a_default(params: Any, clip: Any = imported_before) -> Tensor:
    return clip(params, 15.0)


WAYS = {
    "attribute": lambda params: torch.nn.utils.clip_grad_norm_(params, 15.0),
    "imported before": lambda params: imported_before(params, 15.0),
    "of the module": lambda params: from_the_module(params, max_norm=15.0),
    "partial": functools.partial(imported_before, max_norm=15.0),
    "of a class": lambda params: ATrainer.clip(params, 15.0),
    "default of an argument": through_a_default,
    "deprecated": lambda params: torch.nn.utils.clip_grad_norm(params, 15.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.clip_grad_norm` is now:FutureWarning")
def test_every_name_is_replaced_and_comes_back(way: str) -> None:
    once, twice = 1400**0.5, 2800**0.5  # torch counts a parameter twice that is given twice
    param = a_parameter()
    with replacing_torch() as replaced:
        norm = WAYS[way]([param, param])
    assert norm.item() == pytest.approx(once)
    assert param.grad is not None
    torch.testing.assert_close(param.grad, GRADIENT * (15 / once))
    assert replaced.num_calls == {"clip_grad_norm_": 1}

    param = a_parameter()
    assert WAYS[way]([param, param]).item() == pytest.approx(twice)


def test_all_functions_take_their_arguments_as_torch_has_them() -> None:
    param = a_parameter()
    with replacing_torch() as replaced:
        norm = torch.nn.utils.get_total_norm([GRADIENT], norm_type=1.0, foreach=False)
        assert norm.item() == 60
        torch.nn.utils.clip_grads_with_norm_(param, 15.0, norm)
        torch.testing.assert_close(param.grad, GRADIENT / 4, rtol=1e-6, atol=0)
        torch.nn.utils.clip_grad_value_([param], clip_value=3.0)
        assert param.grad is not None
        assert param.grad.tolist() == [2.5, 3.0, 3.0]
        param.grad.fill_(math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            torch.nn.utils.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
        with pytest.warns(UserWarning, match="empty generator"):
            torch.nn.utils.clip_grad_norm_((p for p in ()), 1.0)
        parameters = iter([a_parameter()])
        assert torch.nn.utils.clip_grad_norm_(parameters, 1e9).item() == pytest.approx(1400**0.5)
    assert sorted(replaced.num_calls.items()) == [
        ("clip_grad_norm_", 3),
        ("clip_grad_value_", 1),
        ("clip_grads_with_norm_", 1),
        ("get_total_norm", 1),
    ]


def test_texts_and_flags_are_read_as_torch_reads_them() -> None:
    for arguments in (["15"], ["15.0", "2"], [torch.tensor(15.0), "2.0", 0], [15, 2, None, 1]):
        param = a_parameter()
        torchs_own = imported_before([param], *arguments)
        expected, param.grad = param.grad, GRADIENT.clone()
        with replacing_torch():
            norm = imported_before([param], *arguments)
        torch.testing.assert_close(norm, torchs_own)
        torch.testing.assert_close(param.grad, expected)
    with replacing_torch():
        assert imported_before(a_parameter(), "inf", "inf").item() == 30.0
        torch.nn.utils.clip_grad_value_(param, "1")
        assert param.grad is not None
        assert param.grad.tolist() == [1.0, 1.0, 1.0]
        for bad in ("large", "", None, [1.0, 2.0]):
            with pytest.raises(TypeError, match="cannot clip with max_norm"):
                imported_before([param], bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="neither yes nor no"):
            imported_before([param], 1.0, error_if_nonfinite="False")  # type: ignore[arg-type]


def test_torch_is_back_after_an_error_and_a_second_block_is_one() -> None:
    def fail() -> None:
        with replacing_torch():
            with pytest.raises(ValueError, match="distclip's already"), replacing_torch():
                pass
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    param = a_parameter()
    assert imported_before([param, param], 1e9).item() == pytest.approx(2800**0.5)
    with replacing_torch():  # not one inside another
        assert imported_before([param, param], 1e9).item() == pytest.approx(1400**0.5)


def test_wrong_arguments_are_refused_before_anything_is_replaced() -> None:
    for bad in ({"mesh": "pp"}, {"distinct": "pp"}, {"layouts": 3}):
        with pytest.raises(TypeError), replacing_torch(**bad):  # type: ignore[arg-type]
            pass
    with replacing_torch():
        pass


def test_a_version_of_torch_with_other_arguments_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def newer(parameters, max_norm, norm_kind=2.0):
        raise AssertionError

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", newer)
    with pytest.raises(RuntimeError, match=r"cannot replace torch's.*norm_kind"), replacing_torch():
        pass
    assert newer.__code__.co_name == "newer"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", functools.partial(imported_before))
    with pytest.raises(RuntimeError, match=r"put functools.partial.* in its"), replacing_torch():
        pass


# --- ranks ---


def sharded(mesh: Any, placements: list[Any], seed: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A parameter with a gradient on `mesh`, and the whole gradient."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grad = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    return param, whole


def stage_of_a_pipeline() -> tuple[Any, list[Any], list[list[Tensor]]]:
    """The mesh, this stage's parameters on two meshes of their own, all stages' whole gradients."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = root.get_local_rank("pp")
    wholes = []
    params: list[Any] = []
    for each in range(2):
        made = [
            sharded(root["dp"], [Shard(0)], 10 * each, (5, 3)),
            sharded(root["dp"], [Replicate()], 10 * each + 1, (4,)),
        ]
        wholes.append([whole for _, whole in made])
        if each == stage:
            params = [param for param, _ in made]
    return root, params, wholes


def adds_up_the_pipeline(params: list[Any], max_norm: float, group: Any) -> Tensor:
    """A trainer's own clipping, as several have it."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params], 2.0, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm**2
    dist.all_reduce(norm, group=group)
    norm = norm**0.5
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm, foreach=True)
    return norm


def measures_by_clipping(params: list[Any], max_norm: float, group: Any) -> Tensor:
    norm = torch.nn.utils.clip_grad_norm_(params, math.inf)
    norm = norm.full_tensor() ** 2  # type: ignore[attr-defined]  # torch has a DTensor
    dist.all_reduce(norm, group=group)
    norm = norm**0.5
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def leaves_it_to_torch(params: list[Any], max_norm: float, group: Any) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(params, max_norm)


def pipelines() -> None:
    root, _, wholes = stage_of_a_pipeline()
    flat = [whole for stage in wholes for whole in stage]
    expected = reference.total_norm(flat)
    of_its_own = [adds_up_the_pipeline, measures_by_clipping]
    every = [*of_its_own, leaves_it_to_torch]
    runs: list[tuple[dict[str, Any], list[Any]]] = [
        ({}, every),
        ({"mesh": root}, every),
        ({"distinct": ("pp",)}, every),
        ({"mesh": root["pp"]}, of_its_own),
    ]
    for options, trainers in runs:
        for trainer in trainers:
            _, params, _ = stage_of_a_pipeline()
            before = [p.grad.full_tensor().clone() for p in params]
            with replacing_torch(**options):
                norm = trainer(params, 0.5, root.get_group("pp"))
            torch.testing.assert_close(norm.double(), expected, **NORM)
            assert same_bits_everywhere(norm)
            for param, was in zip(params, before, strict=True):
                torch.testing.assert_close(
                    param.grad.full_tensor(), was * (0.5 / expected.item()), rtol=1e-5, atol=0
                )


def no_tensors() -> None:
    """Of one stage, such as one without experts: torch's norm is 0, and no other rank waits."""
    root, params, _ = stage_of_a_pipeline()
    first = root.get_local_rank("pp") == 0
    listed = [] if first else params
    for options in ({}, {"mesh": root}, {"mesh": root["pp"]}):
        with replacing_torch(**options):
            norm = torch.nn.utils.get_total_norm([p.grad for p in listed])
            assert (norm == 0) == first
            assert (torch.nn.utils.clip_grad_norm_(listed, math.inf) == 0) == first


def test_a_stage_without_tensors_has_the_norm_0(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(no_tensors)


def test_a_trainer_that_adds_up_the_pipeline_counts_each_stage_once(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(pipelines)


def torchtitans_own() -> None:
    from torchtitan.distributed.utils import clip_grad_norm_

    for kind in DEGREES:
        dims = dims_of(kind, "cpu")
        params, wholes = parameters(kind, "cpu")
        expected = reference.total_norm(wholes)
        with replacing_torch() as replaced:
            norm = clip_grad_norm_(
                params,
                0.3,
                foreach=True,
                pp_mesh=dims.get_optional_mesh("pp"),
                ep_enabled=dims.ep_enabled,
            )
        assert replaced.num_calls["get_total_norm"] == 1 + dims.ep_enabled, kind
        torch.testing.assert_close(norm.double(), expected, **NORM, msg=kind)
        assert same_bits_everywhere(norm)


@pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_torchtitans_function_reduces_over_its_pipeline_itself(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(torchtitans_own)


def two_meshes() -> None:
    """Dense weights and experts on meshes of their own, beside a plain tensor."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for distinct in (("pp",), ()):
        made = [
            sharded(root["dp"], [Shard(0)], 1, (6, 2)),
            sharded(root["ep"], [Shard(0)], 2, (4, 3)),
        ]
        params, wholes = [param for param, _ in made], [whole for _, whole in made]
        expected = reference.total_norm([*wholes, GRADIENT])
        plain = a_parameter()
        with pytest.raises(RuntimeError):  # torch's own
            torch.nn.utils.clip_grad_norm_([*params, plain], 1.0)
        with replacing_torch(distinct=distinct):
            norm = torch.nn.utils.get_total_norm([p.grad for p in [*params, plain]])
            assert pickle.loads(pickle.dumps(norm)).full_tensor() == norm
            torch.testing.assert_close(norm.double(), expected, **NORM)
            assert type(norm) is Tensor
            clipped = imported_before([*params, plain], 1.0)
        torch.testing.assert_close(clipped.double(), expected, **NORM)
        after = [p.grad.full_tensor() for p in params]
        torch.testing.assert_close(
            reference.total_norm([*after, plain.grad]).item(), 1.0, rtol=1e-5, atol=0
        )


def test_two_meshes_and_a_plain_tensor(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(two_meshes)


def fsdp1() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    data = torch.randn(4, 5)
    whole(data).square().sum().backward()
    expected = reference.total_norm([p.grad for p in whole.parameters()])
    whole.zero_grad()
    model = FullyShardedDataParallel(whole, device_id=torch.device("cpu"))
    clip = model.clip_grad_norm_  # a bound method, taken before
    model(data).square().sum().backward()
    with replacing_torch() as replaced:
        norm = clip(0.5)
        with pytest.raises(distclip.LayoutError, match="Pass the wrapped module"):
            imported_before(model.parameters(), 0.5)  # torch: each rank its own norm
    assert replaced.num_calls["clip_grad_norm_"] == 2
    torch.testing.assert_close(norm.double(), expected, **NORM)
    assert expected > 0.5
    after = distclip.get_total_norm(model)
    torch.testing.assert_close(after, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_the_method_of_fsdp1(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(fsdp1)


# --- python -m distclip.run ---

SCRIPT = """
import dataclasses
import os
import subprocess
import sys
import threading
import torch
from torch.nn.utils import clip_grad_norm_
import torch.multiprocessing as mp


@dataclasses.dataclass
class Found:
    norm: float


def found():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([10.0, 20.0, 30.0])
    return Found(round(clip_grad_norm_([param, param], 15.0).item(), 3))  # torch: 52.915


def worker(rank):
    print(f"rank {rank}: {found()}", flush=True)


def after_the_last_line():
    threading.main_thread().join()
    print("thread:", found(), flush=True)


if __name__ == "__main__":
    main = sys.modules["__main__"]
    print("main:", found(), sys.argv[1:], main.found is found, flush=True)
    os.chdir("package")
    print(os.path.exists(__file__), dataclasses.fields(Found)[0].type, flush=True)
    if "spawn" in sys.argv:
        mp.spawn(worker, nprocs=1)
    if "pool" in sys.argv:
        with mp.get_context("spawn").Pool(1) as pool:
            print("pool:", pool.apply_async(found).get(60), flush=True)
    if "launch" in sys.argv:  # as Lightning does
        os.chdir("..")
        again = [a for a in sys.argv[1:] if a != "launch"]
        subprocess.run([sys.executable, "-m", main.__spec__.name, *again])
    threading.Thread(target=after_the_last_line).start()
    sys.exit(3)
"""


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distclip.run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("way", ["script", "module"])
def test_run(way: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    relative = "from . import __name__ as package\n" if way == "module" else ""
    (package / "train.py").write_text(relative + SCRIPT)
    target = ["package/train.py"] if way == "script" else ["-m", "package.train"]
    found = "Found(norm=37.417)"
    children = {"script": "pool", "module": "spawn"}
    done = run([*target, children[way], "--lr", "1"], tmp_path)
    assert done.stdout.splitlines() == [
        f"main: {found} ['{children[way]}', '--lr', '1'] True",
        "True <class 'float'>",
        {"pool": f"pool: {found}", "spawn": f"rank 0: {found}"}[children[way]],
        f"thread: {found}",
    ], done.stderr
    assert done.returncode == 3


def test_processes_that_are_started_by_the_name_of_the_main_module(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "other.py").touch()
    text = "try:\n    from .other import x\nexcept ImportError as error:\n    print(error)\n"
    (package / "train.py").write_text(text + SCRIPT)
    done = run(["package/train.py", "launch", "--lr", "1"], tmp_path)
    lines = done.stdout.splitlines()
    no_package = "attempted relative import with no known parent package"
    found = "Found(norm=37.417)"
    assert lines[:2] == [no_package, f"main: {found} ['launch', '--lr', '1'] True"], done.stderr
    assert f"main: {found} ['--lr', '1'] True" in lines, done.stderr
    assert done.stderr == ""


def test_run_says_where_nothing_was_replaced_or_nothing_can_be_run(tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text("print('idle')\nraise SystemExit(0)")
    done = run(["idle.py"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "idle\n")
    assert "has called none of torch's clipping functions" in done.stderr
    from distclip import run as module

    missing = ["missing_module"], ["missing_module.train"], ["json.missing.py"]
    for argv in (["missing.py"], *(["-m", *name] for name in missing), ["."]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["run", *argv])
            patch.setattr(sys, "path", [*sys.path])
            with pytest.raises(SystemExit, match=r"cannot run .*missing|no such file"):
                module.main()
