"""accelerate: checkpoints, misuse, what happens after `free_memory()`, and its own clipping."""

from __future__ import annotations

import gc
import pickle
import tempfile
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distclip
from distclip import AdaGC, ClipNorm, ZClip
from tests.support import accelerated as acc
from tests.support.ranks import Ranks, mesh

pytest.importorskip("accelerate")

MAX_NORM = 0.5


def prepare(*args: Any, **kwargs: Any) -> Any:
    from distclip.adapters.accelerate import prepare

    return prepare(*args, **kwargs)


def a_policy() -> Any:
    return ZClip(warmup_steps=2) & ClipNorm(MAX_NORM)


def bits(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def trained(
    layout: str, folder: Path | None, steps: range, save_at: int | None = None, **options: Any
) -> tuple[Any, Any, list[Any]]:
    """Some steps, from the checkpoint in `folder` if they do not begin at 0."""
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator, **options)
        clipper = prepare(accelerator, model, optimizer, a_policy())
        reports = []
        if steps.start:
            accelerator.load_state(str(folder))
        for step in steps:
            acc.run_backward(accelerator, model, step)
            reports.append(bits(clipper.step().to_dict()))
            optimizer.zero_grad()
            if step == save_at:
                accelerator.save_state(str(folder))
                accelerator.wait_for_everyone()
        assert any(report["clipped"] for report in reports)
        return bits(clipper.state_dict()), bits(acc.whole_weights(model)), reports


def resumed(folder: str) -> None:
    for layout in ("ddp", "fsdp1", "fsdp2"):
        path = Path(folder) / layout
        state, weights, reports = trained(layout, path, range(3), save_at=1)
        assert (path / "distclip.bin").exists()
        assert not list(path.glob("custom_checkpoint_*"))
        assert trained(layout, path, range(2, 3)) == (state, weights, reports[2:])
        if layout == "ddp":  # the weights of which load on any number of ranks
            if dist.get_rank() == 0:
                one = trained("one process", path, range(2, 3))
                assert one[0]["groups"]["all"]["Minimum"]["first"]["num_steps"] == 3
            dist.barrier()


def test_a_checkpoint_resumes_to_the_same_bits(
    two_accelerated_ranks: Ranks, tmp_path: Path
) -> None:
    two_accelerated_ranks.run(resumed, str(tmp_path))


def several_in_one_checkpoint(folder: str) -> None:
    def made(accelerator: Any) -> list[Any]:
        pairs = [acc.prepared(accelerator) for _ in range(2)]
        return [
            (model, prepare(accelerator, model, optimizer, a_policy()))
            for model, optimizer in pairs
        ]

    with acc.accelerator_for("ddp") as accelerator:
        both = made(accelerator)
        for number, (model, clipper) in enumerate(both):
            for step in range(1 + number):
                acc.run_backward(accelerator, model, step)
                clipper.step()
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
    with acc.accelerator_for("ddp") as accelerator:
        both = made(accelerator)
        accelerator.load_state(folder)
        counts = [
            c.state_dict()["groups"]["all"]["Minimum"]["first"]["num_steps"].item() for _, c in both
        ]
        assert counts == [1, 2]


def from_before_distclip(folder: str) -> None:
    with acc.accelerator_for("ddp") as accelerator:
        acc.prepared(accelerator)
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
    with acc.accelerator_for("ddp") as accelerator:
        model, optimizer = acc.prepared(accelerator)
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            accelerator.load_state(folder)  # nothing to remember
        clipper.detach()
        clipper = prepare(accelerator, model, optimizer, a_policy())
        with pytest.warns(UserWarning, match=r"has no distclip\.bin"):
            accelerator.load_state(folder)
        accelerator.register_for_checkpointing(clipper)  # the user may, beside what is done
        accelerator.save_state(folder + "/2")
        accelerator.wait_for_everyone()
        accelerator.load_state(folder + "/2")


def test_several_in_one_checkpoint(two_accelerated_ranks: Ranks, tmp_path: Path) -> None:
    two_accelerated_ranks.run(several_in_one_checkpoint, str(tmp_path))


def test_a_checkpoint_from_before_distclip(two_accelerated_ranks: Ranks, tmp_path: Path) -> None:
    two_accelerated_ranks.run(from_before_distclip, str(tmp_path))


def mistakes(layout: str) -> None:
    with acc.accelerator_for(layout) as accelerator:
        net = acc.make_net()
        raw = acc.sgd(net.parameters())
        prepare_first = "accelerator.prepare"
        with pytest.raises(ValueError, match=r"this SGD: accelerate has not prepared it"):
            prepare(accelerator, net, raw)
        model, optimizer = acc.prepared(accelerator)
        with pytest.raises(ValueError, match=r"belongs to no model that accelerate has prepared"):
            prepare(accelerator, net, optimizer)
        with pytest.raises(ValueError, match=r"accelerate has not prepared it"):
            prepare(accelerator, model, [optimizer, raw])
        with pytest.raises(TypeError, match=r"it is no accelerate\.Accelerator"):
            prepare(model, optimizer, accelerator)
        with pytest.raises(TypeError, match=r"cannot prepare without an optimizer"):
            prepare(accelerator, model, [])
        with pytest.raises(TypeError, match=r"no optimizer, and holds none"):
            prepare(accelerator, model, model)
        with pytest.raises(TypeError):
            prepare(accelerator, optimizer, optimizer)
        other, its = acc.prepared(accelerator) if layout != "fsdp2" else (model, optimizer)
        if other is not model:
            with pytest.raises(ValueError, match=r"steps none of the parameters"):
                prepare(accelerator, model, its)
        assert prepare_first
        # None of these has left anything behind.
        assert "clip_grad_norm_" not in vars(accelerator)
        assert "step" not in vars(optimizer)
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        with pytest.raises(ValueError, match=r"this SGD again: distclip\.adapters\.accelerate"):
            prepare(accelerator, model, optimizer)
        clipper.detach()
        clipper.detach()
        with pytest.raises(RuntimeError, match=r"this clipper was detached"):
            clipper.clip_()
        assert "step" not in vars(optimizer)
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM), on_nonfinite="raise")
        acc.run_backward(accelerator, model)
        assert clipper.step().clipped
        with pytest.raises(TypeError, match="unexpected keyword"):
            prepare(accelerator, model, optimizer, max_norm=1.0)


def own_clipping(layout: str) -> None:
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        acc.run_backward(accelerator, model)
        for call in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
            with pytest.raises(ValueError, match=r"they would be clipped twice"):
                call(model.parameters(), 1.0)
            with pytest.raises(ValueError, match=r"they would be clipped twice"):
                call(list(model.parameters())[:1], 1.0)
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm=float("inf"))
        assert getattr(norm, "full_tensor", lambda: norm)() > 1  # it only measures
        elsewhere = nn.Parameter(torch.zeros(2))
        elsewhere.grad = torch.tensor([3.0, 4.0])
        assert accelerator.clip_grad_norm_(iter([elsewhere]), 1.0) == 5  # nobody else's matter
        torch.testing.assert_close(elsewhere.grad.norm(), torch.tensor(1.0))
        clipper.detach()
        assert "clip_grad_norm_" not in vars(accelerator)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        assert getattr(norm, "full_tensor", lambda: norm)() > 1


def every_mistake() -> None:
    for layout in ("one process", "ddp", "fsdp1", "fsdp2"):
        mistakes(layout)
        own_clipping(layout)


def test_mistakes_are_clear_errors(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_mistake)


def freed(layout: str) -> None:
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        old = prepare(accelerator, model, optimizer, a_policy())
        acc.run_backward(accelerator, model)
        assert old.step().clipped
        accelerator.free_memory()
        with pytest.raises(ValueError, match=r"of before `accelerator\.free_memory\(\)`"):
            prepare(accelerator, model, optimizer)
        # The same objects again, as where a smaller batch is tried; and others.
        model, optimizer = accelerator.prepare(model, optimizer)
        again = prepare(accelerator, model, optimizer, a_policy())
        with pytest.raises(RuntimeError, match="was detached"):
            old.step()
        optimizer.zero_grad()
        acc.run_backward(accelerator, model)
        assert again.step().clipped
        accelerator.free_memory()
        model, optimizer = acc.prepared(accelerator)
        last = prepare(accelerator, model, optimizer, a_policy())
        acc.run_backward(accelerator, model)
        assert last.step().clipped
        assert last.index == 0
        # What the user drops is gone, and its optimizer is free.
        held = weakref.ref(last)
        del last
        gc.collect()
        assert held() is None
        assert "step" not in vars(optimizer)
        assert "clip_grad_norm_" not in vars(accelerator)
        last = prepare(accelerator, model, optimizer, a_policy())
        copy = pickle.loads(pickle.dumps(optimizer)) if layout == "ddp" else None
        assert copy is None or "step" not in vars(copy) or callable(copy.step)
        if layout == "one process":
            copy = pickle.loads(pickle.dumps(accelerator))
            assert "clip_grad_norm_" in vars(accelerator)
            assert copy.clip_grad_norm_.__self__ is copy
        released = weakref.ref(model)
        model, optimizer, last = accelerator.free_memory(model, optimizer, last)
        del again, old
        gc.collect()
        assert layout != "ddp" or released() is None


def collected_while_saving() -> None:
    """The garbage collector runs while accelerate goes through its hooks."""
    with acc.accelerator_for("one process") as accelerator, tempfile.TemporaryDirectory() as folder:
        held: list[Any] = []

        def collect(*_: object) -> None:
            held.clear()
            gc.collect()

        accelerator.register_save_state_pre_hook(collect)
        model, optimizer = acc.prepared(accelerator)
        held.append(prepare(accelerator, model, optimizer, a_policy()))
        accelerator.save_state(folder)
        assert not held
        hooks = accelerator._save_model_state_pre_hook
        last = prepare(accelerator, model, optimizer, a_policy())
        assert len(hooks) == 2  # that of the one which is gone is, too
        last.detach()
        assert len(hooks) == 1


def test_one_that_is_gone_while_accelerate_saves(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(collected_while_saving)


def every_freed() -> None:
    for layout in ("ddp", "fsdp2", "one process"):
        freed(layout)


def test_after_free_memory(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_freed)


def between() -> None:
    """`optimizer.step()` of the user's own between our calls steps, and changes nothing else."""
    expected = acc.whole_gradients(1)
    with acc.accelerator_for("ddp") as accelerator:
        model, optimizer = acc.prepared(accelerator)
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        for call in (lambda: None, clipper.step, lambda: None, clipper.clip_):
            before = acc.whole_weights(model)
            acc.run_backward(accelerator, model)
            report = call()
            if call != clipper.step:
                optimizer.step()
            if call == clipper.step:
                assert report.clipped
                torch.testing.assert_close(
                    acc.whole_norm(acc.applied(model, before)).float(),
                    torch.tensor(MAX_NORM), rtol=1e-4, atol=0,
                )  # fmt: skip
            if report is None:
                assert acc.whole_norm(acc.applied(model, before)) > 1.5
            optimizer.zero_grad()
        assert expected

        def closure() -> Any:
            optimizer.zero_grad()
            loss = acc.loss_of(model, acc.batch(0, dist.get_rank()))
            loss.backward()
            return loss

        before = acc.whole_weights(model)
        assert clipper.step(closure=closure).clipped
        assert acc.whole_norm(acc.applied(model, before)) < MAX_NORM * 1.001
        before = acc.whole_weights(model)
        optimizer.zero_grad()
        acc.run_backward(accelerator, model)
        report = clipper.step(scale=0.5)
        whole = acc.whole_gradients(1, weights={n: w.double() for n, w in before.items()})
        torch.testing.assert_close(
            report.total_norm.double(), acc.whole_norm(whole) / 2, rtol=1e-5, atol=0
        )


def test_steps_of_the_users_own(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(between)


def other_options() -> None:
    for layout in ("ddp", "fsdp2"):
        with acc.accelerator_for(layout) as accelerator:
            model, optimizer = acc.prepared(accelerator)
            everyone = mesh((2,), ("dp",))
            clipper = prepare(
                accelerator,
                model,
                optimizer,
                AdaGC() if layout == "ddp" else ClipNorm(MAX_NORM),
                mesh=everyone if layout == "ddp" else None,
                distinct=["pp"],
                overlap=layout == "ddp",
                max_consecutive_skips=1,
                on_nonfinite="skip",
            )
            acc.run_backward(accelerator, model)
            clipper.step(step=1)
            for number in range(2):
                optimizer.zero_grad()
                acc.run_backward(accelerator, model)
                for param in model.parameters():
                    getattr(param.grad, "_local_tensor", param.grad).fill_(float("nan"))
                with ExitStack() as stack:
                    if number == 1:
                        error = distclip.NonFiniteGradientError
                        stack.enter_context(pytest.raises(error))
                    clipper.step()


def test_options_of_clipper_pass_through(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(other_options)


def unsupported() -> None:
    with acc.accelerator_for("one process") as accelerator:
        model, optimizer = acc.prepared(accelerator)
        accelerator.has_lomo_optimizer = True  # as `prepare` sets it for one
        with pytest.raises(ValueError, match="cannot clip under a LOMO optimizer"):
            prepare(accelerator, model, optimizer)
        accelerator.has_lomo_optimizer = False
        from accelerate.utils import DistributedType

        accelerator.state.distributed_type = DistributedType.MEGATRON_LM
        with pytest.raises(ValueError, match="cannot clip under MEGATRON_LM"):
            prepare(accelerator, model, optimizer)
        accelerator.state.distributed_type = DistributedType.NO


def test_what_keeps_no_gradients_is_refused(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(unsupported)


# What accelerate's own clipping does, with 1.15.0 and torch 2.13; docs/accelerate.md quotes it.


def own_with_a_part_under_fsdp1() -> None:
    expected = acc.whole_gradients(1)
    body = acc.whole_norm({n: g for n, g in expected.items() if "body" in n}).item()
    with acc.accelerator_for("fsdp1") as accelerator:
        model, _ = acc.prepared(accelerator)
        acc.run_backward(accelerator, model)
        part = [p for n, p in model.named_parameters() if "body" in n]
        norm = accelerator.clip_grad_norm_(part, MAX_NORM).item()
        dist.all_gather_object(norms := [0.0, 0.0], norm)
        # That of each rank's own shard: each would clip by another coefficient.
        assert norms[0] != norms[1]
        assert max(norms) < 0.999 * body
        assert sum(each**2 for each in norms) == pytest.approx(body**2, rel=1e-5)


def own_of_each_type() -> None:
    """The norm of any type is right where all parameters lie on one mesh."""
    expected = acc.whole_gradients(1)
    for layout in ("fsdp1", "fsdp2"):
        for norm_type in (float("inf"), 1.0):
            with acc.accelerator_for(layout) as accelerator:
                model, _ = acc.prepared(accelerator)
                acc.run_backward(accelerator, model)
                norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM, norm_type)
                norm = getattr(norm, "full_tensor", lambda norm=norm: norm)()
                whole = acc.whole_norm(expected, norm_type)
                torch.testing.assert_close(norm.double(), whole, rtol=1e-5, atol=0)


def own_on_two_meshes_beside_plain() -> None:
    with acc.accelerator_for("fsdp2") as accelerator:
        params = [
            nn.Parameter(distribute_tensor(torch.zeros(4), mesh((2,), (axis,)), [Shard(0)]))
            for axis in ("dp", "ep")
        ]
        for param in params:
            param.grad = distribute_tensor(torch.full((4,), 3.0), param.device_mesh, [Shard(0)])
        params.append(nn.Parameter(torch.zeros(3)))
        params[-1].grad = torch.full((3,), 2.0)
        norm = accelerator.clip_grad_norm_(params, MAX_NORM)
        assert not isinstance(norm, DTensor)
        torch.testing.assert_close(norm, torch.tensor(2 * 36.0 + 12.0).sqrt())


def own_with_two_optimizers_under_a_scaler() -> None:
    """The first step updates the scaler, which then forgets that all gradients are unscaled."""
    scaler = GradScaler("cpu", init_scale=1024.0)
    clipped = acc.norm_clipped(acc.whole_gradients(1), MAX_NORM)
    with acc.accelerator_for("ddp", scaler) as accelerator:
        model = accelerator.prepare(acc.make_net())
        parts = (model.module.body, model.module.head)
        handles = [accelerator.prepare(acc.sgd(part.parameters())) for part in parts]
        accelerator.native_amp = True
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        for handle in handles:
            handle.step()
        found = acc.applied(model, before)
        for name, grad in clipped.items():
            factor = 1 / 1024 if "head" in name else 1.0
            torch.testing.assert_close(
                found[name].double(), grad * factor, rtol=1e-4, atol=2**-23 / acc.LR
            )


def own_flag_of_a_fused_optimizer() -> None:
    with acc.accelerator_for("one process", GradScaler("cpu", init_scale=1024.0)) as accelerator:
        model, optimizer = acc.prepared(accelerator, acc.fused)
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        next(model.parameters()).grad.fill_(float("inf"))
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        torch.testing.assert_close(acc.whole_weights(model), before, rtol=0, atol=0)
        assert not optimizer.step_was_skipped


OWN: dict[str, Callable[[], None]] = {
    "a part under FSDP1": own_with_a_part_under_fsdp1,
    "two optimizers under a scaler": own_with_two_optimizers_under_a_scaler,
    "the flag of a fused optimizer": own_flag_of_a_fused_optimizer,
    "types of norm": own_of_each_type,
    "two meshes beside plain": own_on_two_meshes_beside_plain,
}


@pytest.mark.parametrize("case", OWN)
def test_what_accelerates_own_clipping_does(two_accelerated_ranks: Ranks, case: str) -> None:
    two_accelerated_ranks.run(OWN[case])
