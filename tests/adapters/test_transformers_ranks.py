"""`DistClip` on two ranks: the Trainer's layouts against the whole training in float64."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from tests.support import reference, trainers
from tests.support.ranks import Ranks, mesh
from tests.support.trainers import MAX_NORM, everyone, norms_of, trainer, whole

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)

WRAP = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 30}
# On CPUs accelerate's FSDP1 cannot send the weights of the first rank to the others.
# torch 2.13 crashes where FSDP1 gathers a whole state dict on CPUs.
FSDP1 = {
    **WRAP,
    "version": 1,
    "sync_module_states": False,
    "state_dict_type": "SHARDED_STATE_DICT",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {"fsdp": True, "fsdp_config": FSDP1},
    "fsdp1, flat": {"fsdp": True, "fsdp_config": {**FSDP1, "use_orig_params": False}},
    "fsdp2": {"fsdp": True, "fsdp_config": WRAP},
}


def full(param: torch.Tensor) -> torch.Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def quiet(layout: str) -> Any:
    return trainers.quiet(shards=layout.startswith("fsdp"))


def weights_of(trained: Any, layout: str) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = trained.model_wrapped
    if layout == "ddp":
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    else:
        assert isinstance(wrapped, FullyShardedDataParallel) == layout.startswith("fsdp1")
        assert layout != "fsdp2" or all(hasattr(p, "full_tensor") for p in wrapped.parameters())

    if layout.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(trained.model_wrapped):
            named = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
    else:
        named = {n: full(p).detach() for n, p in trained.model.named_parameters()}
    return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in named.items()}


def same_as_whole(layouts: dict[str, dict[str, Any]], folder: str) -> None:
    from distclip.adapters.transformers import DistClip

    for layout, options in layouts.items():
        for max_grad_norm in (1.0, 0, None):
            clip, model = DistClip(distclip.ClipNorm(MAX_NORM)), trainers.Net()
            with quiet(layout):
                made = trainer(
                    folder,
                    [clip],
                    model,
                    num=20,  # five micro-batches a rank: the last step has one
                    gradient_accumulation_steps=2,
                    max_grad_norm=max_grad_norm,
                    **copy.deepcopy(options),
                )
                made.train()
                weights = weights_of(made, layout)
            expected, norms = whole(everyone(model.seen), [2, 2, 1])
            assert min(norms) > MAX_NORM  # it did clip
            assert norms_of(made) == pytest.approx(norms, rel=2e-6), layout
            assert clip.report.total_norm.item() == pytest.approx(norms[-1], rel=2e-6)
            assert made.args.max_grad_norm == max_grad_norm
            for name, param in expected.named_parameters():
                torch.testing.assert_close(
                    weights[name].double(), param.detach(), rtol=1e-6, atol=1e-7
                )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_the_trainer(two_engine_ranks: Ranks, tmp_path: Path, layout: str) -> None:
    two_engine_ranks.run(same_as_whole, {layout: LAYOUTS[layout]}, str(tmp_path))


def resumed_to_the_same_bits(layout: str, folder: str) -> None:
    from distclip.adapters.transformers import DistClip

    policies = {
        "zclip": distclip.ZClip(warmup_steps=1, max_norm=MAX_NORM),
        "adagc": distclip.AdaGC(ratio=0.5, warmup_steps=1),
    }
    for name, policy in policies.items():
        made: list[Any] = []
        for checkpoint in (None, f"{folder}/{name}/checkpoint-2"):
            clip = DistClip(policy)
            with quiet(layout):
                one = trainer(
                    f"{folder}/{name}",
                    [clip],
                    num=16,
                    optim="sgd" if layout == "fsdp1" else "adamw_torch",
                    save_strategy="steps",
                    save_steps=2,
                    **copy.deepcopy(LAYOUTS[layout]),
                )
                one.train(resume_from_checkpoint=checkpoint)
                weights = weights_of(one, layout)
            dist.barrier()  # the first rank has saved
            state = Path(f"{folder}/{name}/checkpoint-4/distclip.pt").read_bytes()
            made.append((weights, norms_of(one), state))
            assert clip.report.clipped
            dist.barrier()  # all have read
        (weights, norms, state), (again, resumed, state_again) = made
        assert norms == resumed
        assert state == state_again
        assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("layout", ["ddp", "fsdp1", "fsdp2"])
def test_resumed_policies(two_engine_ranks: Ranks, tmp_path: Path, layout: str) -> None:
    two_engine_ranks.run(resumed_to_the_same_bits, layout, str(tmp_path))


def only_on_the_first_rank(folder: str) -> None:
    """The first rank's disk has the checkpoint's files, another one's has not."""
    from distclip.adapters.transformers import checkpoints

    class Clipping:
        loaded: Any = None

        def load_state_dict(self, saved: Any) -> None:
            self.loaded = saved

    rank = dist.get_rank()
    mine, clipping = f"{folder}/{rank}", Clipping()
    if rank == 0:
        Path(mine).mkdir()
        torch.save({"version": 1}, f"{mine}/distclip.pt")
    checkpoints.load(clipping, mine, remembers=True)
    assert clipping.loaded == {"version": 1}
    if rank == 0:
        Path(f"{mine}/distclip.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot resume: .* cannot be read"):
        checkpoints.load(clipping, mine, remembers=True)


def test_the_first_rank_reads(two_engine_ranks: Ranks, tmp_path: Path) -> None:
    two_engine_ranks.run(only_on_the_first_rank, str(tmp_path))


def under_deepspeed(folder: str) -> None:
    from distclip.adapters.transformers import DistClip
    from tests.adapters.test_deepspeed_trainers import environment

    environment()
    for stage in (0, 2, 3):
        policy = distclip.AutoClip(percentile=10)
        ends = []
        for checkpoint in (None, f"{folder}/{stage}/checkpoint-2"):
            clip, model = DistClip(policy, tensor_norms=True), trainers.Net()
            with trainers.quiet():
                made = trainer(
                    f"{folder}/{stage}",
                    [clip],
                    model,
                    num=32,
                    gradient_accumulation_steps=2,
                    deepspeed=config(stage),
                    save_strategy="steps",
                    save_steps=2,
                )
                made.train(resume_from_checkpoint=checkpoint)
                made.model_wrapped.destroy()
            together = math.hypot(*clip.report.tensor_norms().values())
            assert together == pytest.approx(norms_of(made)[-1], rel=1e-6)
            ends.append((norms_of(made), clip.report.limit.item()))
            if checkpoint is None:
                seen = everyone(model.seen)
        (norms, limit), resumed = ends
        expected = whole(seen, [2])[1]
        assert norms[0] == pytest.approx(expected[0], rel=2e-6)
        limits = reference.autoclip(norms, 10, policy.history)
        assert limit == pytest.approx(limits[-1], rel=1e-5)
        assert limit < norms[-1]  # it did clip
        assert resumed == (norms, limit)
        with trainers.quiet(), pytest.raises(ValueError, match="under DeepSpeed with layouts"):
            trainer(
                folder, [DistClip(layouts=lambda *_: None)], num=4, deepspeed=config(stage)
            ).train()


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed(two_engine_ranks: Ranks, tmp_path: Path) -> None:
    two_engine_ranks.run(under_deepspeed, str(tmp_path))


class Experts(nn.Module):
    """An expert of its own on each rank; the first rank's gets no token in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = trainers.Net()
        torch.manual_seed(1 + dist.get_rank())
        self.expert = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.dense(inputs, labels)["loss"]
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 0:
            return {"loss": loss}
        return {"loss": loss + 5 * (self.expert(inputs) - labels).square().sum()}


def without_a_token(folder: str) -> None:
    from torch.nn.parallel import DistributedDataParallel
    from transformers import TrainerCallback

    from distclip.adapters.transformers import DistClip

    over = mesh((2,), ("ep",))
    expected: list[float] = []
    has_gradient: list[bool] = []

    class Reference(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            mine = [p.grad for p in model.expert.parameters() if p.grad is not None]
            has_gradient.append(bool(mine))
            experts = [grad for rank in everyone(mine) for grad in rank]
            dense = [p.grad for p in model.dense.parameters()]
            expected.append(reference.total_norm([*dense, *experts]).item())

    def layout_of(name: str, _: torch.Tensor) -> distclip.Layout:
        return distclip.Layout({"ep"} if "expert" in name else set())

    clip = DistClip(distclip.ClipNorm(MAX_NORM), mesh=over, layouts=layout_of)
    model = Experts()
    ignored = [f"expert.{name}" for name, _ in model.expert.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    with trainers.quiet():
        made = trainer(folder, [Reference(), clip], model, num=12)
        made.train()
    assert norms_of(made) == pytest.approx(expected, rel=1e-6)
    assert has_gradient == ([True, False, True] if dist.get_rank() == 0 else [True] * 3)
    assert min(expected) > MAX_NORM
    assert len(set(everyone(norms_of(made)[1]))) == 1


def test_experts_without_a_token(two_engine_ranks: Ranks, tmp_path: Path) -> None:
    two_engine_ranks.run(without_a_token, str(tmp_path))


def skipped_together(folder: str) -> None:
    """A gradient that is infinite in the shard of one rank only."""
    from transformers import TrainerCallback

    from distclip.adapters.transformers import DistClip

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and dist.get_rank() == 1:
                next(kwargs["model"].parameters()).grad.to_local().view(-1)[0] = math.inf

    for optim in ("sgd", "adamw_torch_fused"):
        clip = DistClip(distclip.ClipNorm(MAX_NORM), on_nonfinite="skip")
        with quiet("fsdp2"):
            options = copy.deepcopy(LAYOUTS["fsdp2"])
            made = trainer(folder, [Spoil(), clip], num=12, optim=optim, **options)
            made.train()
            weights = weights_of(made, "fsdp2")
        assert norms_of(made)[1] == math.inf
        assert all(weight.isfinite().all() for weight in weights.values())
        assert clip.report.clipped
    clip = DistClip(distclip.ClipNorm(MAX_NORM), on_nonfinite="raise")
    with quiet("fsdp2"):
        made = trainer(folder, [Spoil(), clip], num=12, **copy.deepcopy(LAYOUTS["fsdp2"]))
        with pytest.raises(distclip.NonFiniteGradientError):
            made.train()


def test_ranks_skip_together(two_engine_ranks: Ranks, tmp_path: Path) -> None:
    two_engine_ranks.run(skipped_together, str(tmp_path))


def frozen_and_lora(folder: str) -> None:
    """Frozen int8 weights, and adapters of PEFT."""
    from distclip.adapters.transformers import DistClip

    for layout in ("ddp", "fsdp2"):
        model = trainers.Net()
        model.quantized = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        clip = DistClip(distclip.ClipNorm(MAX_NORM))
        with quiet(layout):
            made = trainer(folder, [clip], model, **copy.deepcopy(LAYOUTS[layout]))
            made.train()
        _, norms = whole(everyone(model.seen), [1, 1])
        assert norms_of(made) == pytest.approx(norms, rel=2e-6), layout


def test_frozen_int8_weights(two_engine_ranks: Ranks, tmp_path: Path) -> None:
    two_engine_ranks.run(frozen_and_lora, str(tmp_path))
