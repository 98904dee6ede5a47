"""`distclip plan`: what it says of meshes of any size, and of input that it cannot use."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch.distributed as dist

from distclip import cli
from distclip.cli.plan import Plan, PolicyName
from distclip.cli.plan.rows import MAX_ROWS, tensor_rows
from tests.cli import plan_models

MODELS = "tests.cli.plan_models"
ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def plan(function: str, mesh: str, **options: Any) -> dict[str, Any]:
    """As --json has it."""
    text = json.dumps(
        Plan(model=f"{MODELS}:{function}", mesh=mesh, **options).run().to_dict(), allow_nan=False
    )
    assert not dist.is_initialized()
    return json.loads(text)


def shown(capsys: Capture, function: str, mesh: str, *words: str) -> str:
    assert cli.main(["plan", "--model", f"{MODELS}:{function}", "--mesh", mesh, *words]) == 0
    return capsys.readouterr().out


def test_all_ranks_together_count_every_element_once() -> None:
    """Sizes that no axis divides: some ranks hold less than others, and some nothing."""
    plans = [plan("stage", "pp=2,fsdp=3,tp=2", rank=rank) for rank in range(12)]
    counted: Counter[str] = Counter()
    for each in plans:
        (mine,) = (s for s in each["stages"] if s["rank"] == each["rank"]["rank"])
        counted.update({t["name"]: t["held"] * t["counted"] for t in mine["tensors"]})
    whole = {name: param.numel() for name, param in plan_models.Stack().named_parameters()}
    assert counted == whole
    assert {each["elements"] for each in plans} == {sum(whole.values())}
    assert len({each["rank"]["held"] for each in plans}) > 2
    assert sum(each["rank"]["counted"] for each in plans) == sum(whole.values())


def test_it_says_where_tensors_are_sharded_and_who_counts_copies() -> None:
    found = plan("stage", "pp=2,dp=2,fsdp=2,tp=2", rank=5)  # dp=1, tp=1
    assert found["rank"]["coordinate"] == {"pp": 0, "dp": 1, "fsdp": 0, "tp": 1}
    assert [stage["rank"] for stage in found["stages"]] == [5, 13]
    tensors = {t["name"]: t for stage in found["stages"] for t in stage["tensors"]}
    up, norm = tensors["layers.0.up.weight"], tensors["layers.1.norm.weight"]
    assert (up["sharded_over"], up["copied_over"]) == (["fsdp", "tp"], ["dp"])
    assert (norm["sharded_over"], norm["copied_over"]) == (["fsdp"], ["dp", "tp"])
    assert (up["shape"], up["elements"], up["held"]) == ([14, 10], 140, 40)
    assert found["rank"]["counted"] == 0
    assert found["rank"]["gradient_bytes"] == 4 * found["rank"]["held"] > 0


def test_a_plain_model_is_sharded_by_fsdp_and_copied_by_dp() -> None:
    found = plan("without_mesh", "dp_replicate=2,fsdp=3", rank=1)
    for tensor in found["stages"][0]["tensors"]:
        assert (tensor["sharded_over"], tensor["copied_over"]) == (["fsdp"], ["dp_replicate"])
    assert found["each_step"]["over"] == {"dp_replicate": 2, "fsdp": 3}
    copied = plan("without_mesh", "dp=4,tp=1", rank=3)
    assert copied["elements"] == plan_models.numel(plan_models.Stack())
    assert copied["rank"]["held"] == copied["rank"]["counted"] == copied["elements"]
    assert copied["each_step"]["all_reduces"] == 0


def test_the_message_depends_on_the_policy_and_on_all_stages() -> None:
    mesh = "pp=2,fsdp=2"
    num_tensors = sum(1 for _ in plan_models.Stack().parameters())
    assert plan("stage", mesh)["each_step"]["float64"] == 8
    for sent in (
        plan("stage", mesh, policy="tensor-norm")["each_step"]["bytes"],
        plan("stage", mesh, tensor_norms=True)["each_step"]["bytes"],
    ):
        assert 8 * (6 + 1 + num_tensors) <= sent < 8 * (6 + 1 + num_tensors + 8)
    one_stage = plan("stage", "pp=1,fsdp=4", policy="tensor-norm")["each_step"]["bytes"]
    assert one_stage == sent


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_policy_has_a_plan(policy: Any) -> None:
    found = plan("stage", "pp=2,fsdp=2", policy=policy)["policies"]["all"]
    assert found.partition("(")[0].lower().endswith(policy.replace("-", ""))


def test_a_clipper_brings_its_policy_and_groups() -> None:
    agc = plan("agc_clipper", "pp=2,fsdp=2")
    assert agc["policies"]["all"].startswith("AGC(")
    assert agc["rank"]["weight_bytes"] == agc["rank"]["gradient_bytes"]
    without = plan("stage", "pp=2,fsdp=2", policy="agc")
    assert agc["each_step"]["bytes"] > without["each_step"]["bytes"]
    groups = plan("of_two_groups", "pp=2,fsdp=2")
    assert list(groups["policies"]) == ["layers", "rest"]
    assert Counter(t["group"] for t in groups["stages"][1]["tensors"]) == {"layers": 12, "rest": 1}


def test_a_part_of_the_world_and_the_parts_of_a_stage() -> None:
    part = plan("clipper_of_a_slice", "fsdp=3,tp=2", rank=3)
    assert part["each_step"]["over"] == {"tp": 2}
    parts = plan("two_parts", "pp=1,fsdp=2")
    names = [tensor["name"] for tensor in parts["stages"][0]["tensors"]]
    assert names[0] == "embedding.weight"
    assert names[-1] == "down.bias"


def test_alike_layers_share_a_line(capsys: Capture) -> None:
    out = shown(capsys, "stage", "pp=2,fsdp=3,tp=2", "--rank", "3", "--policy", "agc")
    (line,) = (line for line in out.splitlines() if "up.weight" in line)
    # [14, 10] in 5 layers, of which the rank has 3: 7 rows for each of tp, 3 for each of fsdp.
    cells = ["layers.[0-4].up.weight", "0-1", "shard", "shard", "5", "700", "90", "90"]
    assert line.split() == cells
    assert "Rank 3 (pp=0, fsdp=1, tp=1)" in out
    assert "one all-reduce of" in out


def test_other_names_than_those_of_layers_become_lines_of_modules() -> None:
    result = Plan(model=f"{MODELS}:without_mesh", mesh="fsdp=2").run()
    (stage,) = result.planned.stages
    names = [f"{a}.{b}.weight" for a in ("encoder", "decoder") for b in map(chr, range(97, 122))]
    many = [replace(stage.tensors[0], name=name) for name in names]
    rows = tensor_rows([replace(stage, tensors=many)])
    assert [row.name for row in rows] == ["encoder.*", "decoder.*"]
    assert len(rows) <= MAX_ROWS
    assert sum(len(row.tensors) for row in rows) == len(many) > MAX_ROWS


def test_16384_ranks_take_seconds_no_memory_and_few_lines(capsys: Capture) -> None:
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = shown(capsys, "forty_layers", "pp=4,fsdp=512,tp=8", "--rank", "16383")
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert " 85,9" in out.partition("\n")[0]
    assert "over 16,384 ranks" in out
    assert len(out.splitlines()) < 50


def test_the_models_of_stages_are_in_memory_one_after_the_other() -> None:
    assert len(plan("alone", "pp=3,fsdp=2")["stages"]) == 3


def test_what_the_user_prints_is_not_in_the_json() -> None:
    words = ["plan", "--model", f"{MODELS}:talks", "--mesh", "fsdp=2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "distclip.cli", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2
    for line in ("from Python", "past the redirection", "from another process"):
        assert line in done.stderr


def test_where_nothing_is_reduced_each_rank_counts_for_itself(capsys: Capture) -> None:
    out = shown(capsys, "without_mesh", "dp=4", "--rank", "3")
    assert "which each rank counts for itself" in " ".join(out.split())
    assert "no collective, because no rank has elements" in " ".join(out.split())
    assert "index 0 counts" in " ".join(shown(capsys, "without_mesh", "fsdp=4").split())


def test_a_file_beside_others_is_found(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "distclip_plan_sizes.py").write_text("WIDTH = 3\n")
    (tmp_path / "distclip_plan_train.py").write_text(
        "import argparse\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from distclip_plan_sizes import WIDTH\n"
        "options = argparse.ArgumentParser().parse_args()\n"
        "@dataclass\nclass Config:\n    width: int = WIDTH\n"
        "class Model(nn.Linear):\n"
        "    def __init__(self, config=Config()): super().__init__(config.width, 2)\n"
    )
    target = f"{tmp_path / 'distclip_plan_train.py'}:Model"
    assert cli.main(["plan", "--model", target, "--mesh", "fsdp=2"]) == 0
    assert "8 elements on fsdp=2 ranks" in capsys.readouterr().out


def test_the_page_shows_what_its_example_prints(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text().partition("## plan")[2]
    code, session = (
        page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "console")
    )
    command, _, expected = session.partition("\n")
    (tmp_path / "train.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(command.split()[2:]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == expected.splitlines()


@pytest.mark.parametrize(
    ("function", "mesh", "text"),
    [
        ("no_module", "fsdp=2", "it returned None, not an nn.Module"),
        ("no_parts", "fsdp=2", "it returned [], not an nn.Module"),
        ("no_parameters", "fsdp=2", "its model has no parameters to clip"),
        ("lazy", "fsdp=2", "lazy parameters"),
        ("raises", "fsdp=2", "KeyError: 'the vocabulary' (at "),
        ("ends", "fsdp=2", "it ends the process with 'no data'"),
        ("on_a_gpu", "fsdp=2", "it runs without a GPU"),
        ("reads_values", "fsdp=2", "where tensors have no values"),
        ("of_two_arguments", "fsdp=2", "it needs the arguments mesh, config"),
        ("scalar", "fsdp=2", "cannot shard the model of"),
        ("without_mesh", "fsdp=2,tp=2", "--mesh tp=2: a plain model does not say"),
        ("without_mesh", "fsdp=2,dp_shard=2", "--mesh dp_shard=2: a plain model does not say"),
        ("on_another_mesh", "pp=2,fsdp=2", "its model lies on another mesh, fsdp=2,pp=2"),
        ("on_another_mesh", "fsdp=4", "its model lies on another mesh, fsdp=2,pp=2"),
        ("of_other_groups", "pp=2,fsdp=2", "have 1 or 2 parameter groups"),
        ("no_function", "fsdp=2", "'no_function' is no function but 3"),
        ("nothing", "fsdp=2", "has no 'nothing'"),
        ("stage", "fsdp", "cannot read 'fsdp'"),
        ("stage", "", "cannot read ''"),
        ("stage", "fsdp=2,", "cannot read ''"),
        ("stage", "fsdp=-2", "cannot read 'fsdp=-2'"),
        ("stage", "fsdp=0", "an axis has at least 1 rank"),
        ("stage", "fsdp=2,fsdp=2", "the axis 'fsdp' is given twice"),
        ("stage", "fsdp=1048577", "1,048,577 ranks, of at most 1,048,576"),
        ("stage", "fsdp=2 --rank 2", "--rank 2: the ranks of --mesh fsdp=2 are 0 to 1"),
        ("stage", "fsdp=2 --rank -1", "--rank -1: the ranks"),
        ("agc_clipper", "fsdp=2 --policy agc", "Leave out --policy and --tensor-norms"),
        ("agc_clipper", "fsdp=2 --tensor-norms", "Leave out --policy and --tensor-norms"),
    ],
)
def test_bad_input_is_one_line(capsys: Capture, function: str, mesh: str, text: str) -> None:
    mesh, *words = mesh.split(" ")
    check_fails(capsys, [f"{MODELS}:{function}", "--mesh", mesh, *words], text)
    assert not dist.is_initialized()


def check_fails(capsys: Capture, words: list[str], text: str) -> None:
    assert cli.main(["plan", "--model", *words, "--json"]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("pipeline stages:")]
    assert (out, len(lines)) == ("", 1), err
    assert lines[0].startswith("distclip plan: error: ")
    assert text in lines[0]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def build(:", "SyntaxError: invalid syntax"),
        ("import distclip_no_such_module", "No module named 'distclip_no_such_module' (at "),
        ("raise SystemExit(3)", "SystemExit: it ends the process with 3"),
        ("build = 'text'", "'build' is no function but 'text'"),
        (
            "import torch.distributed as dist\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
            "importing it makes a process group",
        ),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(
    tmp_path: Path, capsys: Capture, source: str | None, text: str
) -> None:
    file = tmp_path / "distclip_plan_broken.py"
    if source is not None:
        file.write_text(source)
    try:
        check_fails(capsys, [f"{file}:build", "--mesh", "fsdp=2"], text)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("distclip_no_such_module:build", "No module named 'distclip_no_such_module'"),
        ("tests.cli.plan_models", "write module:function"),
        (":build", "write module:function"),
    ],
)
def test_a_target_that_names_nothing_is_one_line(capsys: Capture, target: str, text: str) -> None:
    check_fails(capsys, [target, "--mesh", "fsdp=2"], text)
