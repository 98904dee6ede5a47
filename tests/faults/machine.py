"""A state machine of `Clipper`: whatever is called in whatever order, each step is the reference's.

One process; parameters are plain tensors, or DTensors on a mesh of one rank. Each rule that steps
compares gradients, the report, what policies remember, and the parameters after the optimizer.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distclip import Clipper, NonFiniteGradientError
from distclip.errors import SkippedStepsError
from distclip.policies import (
    AGC,
    AdaGC,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    Policy,
    SkipSpike,
    ZClip,
)
from tests.faults.plain_steps import Group, GroupStep, Step, expected

F64 = torch.float64
SHAPES = {"w": (3, 2), "b": (3,), "s": (), "u": (2, 2, 2), "e": (0, 3)}
LATE = {"late0": (4,), "late1": (2, 3)}  # in no Clipper at first
POLICIES: dict[str, Policy[Any]] = {
    "norm": ClipNorm(0.7),
    "norm, p = 1": ClipNorm(2.3, 1.0),
    "norm, p = inf": ClipNorm(0.3, math.inf),
    "measures": ClipNorm(math.inf),
    "tensor": ClipTensorNorm(0.4),
    "rms": ClipBlockRMS(0.11),
    "value": ClipValue(0.23),
    "agc": AGC(0.05, eps=0.013),
    "agc, p = 1": AGC(0.05, norm_type=1.0),
    "autoclip": AutoClip(37.0, history=4),
    "zclip": ZClip(1.7, alpha=0.8, warmup_steps=3, max_norm=None),
    "zclip, bound": ZClip(warmup_steps=2, max_norm=1.9),
    "adagc": AdaGC(1.05, 1.3, 0.9, warmup_steps=2),
    "spike": SkipSpike(3.3, window=4),
    "spike and norm": SkipSpike(2.1, window=4, max_norm=1e3) & ClipNorm(0.9),
    "three": ClipNorm(3.1) & AutoClip(60.0, history=3) & ZClip(warmup_steps=2, max_norm=None),
    "per tensor": ClipTensorNorm(0.6) & AdaGC(warmup_steps=2),
}
VETOES = ("spike", "spike and norm")  # drawn more often than others: they need several steps
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.125, momentum=0.5),
    # torch's fused SGD with momentum raises where parameters get their first gradients in turn.
    "sgd fused": lambda params: torch.optim.SGD(params, lr=0.125, fused=True),
    "adamw foreach": lambda params: torch.optim.AdamW(params, lr=0.125, foreach=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.125, fused=True),
}
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of limits: see plain.py
FLOAT32_MAX = torch.finfo(torch.float32).max
SIZES = [0.0, 1e-30, 1e-3, 0.3, 0.3, 0.3, 0.6, 1.0, 1.0, 4.0, 100.0, 1e25]
POISONS = [math.nan, math.inf, -math.inf, 3e38]


class ClipperMachine(RuleBasedStateMachine):
    saves = Bundle("saves")
    num_compared: ClassVar[int] = 0  # calls, of all machines

    @initialize(
        data=st.data(),
        mode=st.sampled_from(["propagate", "raise", "skip", "zero"]),
        dtype=st.sampled_from(["float32", "float32", "float64", "bfloat16", "mixed"]),
        optimizer=st.sampled_from([*OPTIMIZERS]),
        scaled=st.booleans(),
        sharded=st.sampled_from([False, False, False, True]),
        most_skips=st.sampled_from([0, 2, math.inf]),
    )
    def start(
        self,
        data: st.DataObject,
        mode: str,
        dtype: str,
        optimizer: str,
        scaled: bool,
        sharded: bool,
        most_skips: float,
    ) -> None:
        self.mode, self.most_skips, self.sharded = mode, most_skips, sharded
        self.single = dtype != "float64"
        self.model = nn.Module()
        for index, (name, shape) in enumerate({**SHAPES, **LATE}.items()):
            of = ["float32", "bfloat16"][index % 2] if dtype == "mixed" else dtype
            self.model.register_parameter(name, self._parameter(shape, getattr(torch, of), index))
        self.params = dict(self.model.named_parameters())
        self.stepped = [*SHAPES]  # the optimizer has them
        self.num_groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
        if sharded or self.num_groups == 1:
            self.num_groups = 1
        names = [
            data.draw(st.sampled_from([*POLICIES, *VETOES, *VETOES]), "policy")
            for _ in range(self.num_groups)
        ]
        members = [[*SHAPES][index :: self.num_groups] for index in range(self.num_groups)]
        self.groups = [
            Group.made(f"g{i}", POLICIES[name], members[i]) for i, name in enumerate(names)
        ]
        self.options: dict[str, Any] = {
            "on_nonfinite": mode,
            "max_consecutive_skips": most_skips,
            "overlap": data.draw(st.sampled_from([False, False, True]), "overlap"),
            "tensor_norms": data.draw(st.sampled_from([False, True, 2]), "tensor_norms"),
        }
        if sharded and optimizer == "sgd fused":
            optimizer = "adamw fused"  # torch has no fused SGD of DTensors
        self.optimizer = OPTIMIZERS[optimizer]([self.params[name] for name in self.stepped])
        self.twins = {name: self._twin(param) for name, param in self.params.items()}
        self.twin = OPTIMIZERS[optimizer]([self.twins[name] for name in self.stepped])
        self.folds = "fused" in optimizer
        self.scaler = GradScaler("cpu", init_scale=1024.0) if scaled else None
        self.attached: Any = None
        self.kept: tuple[Any, dict[str, Any]] | None = None
        self._make()

    def _parameter(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> nn.Parameter:
        values = 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        values = values.to(dtype)
        if self.sharded:  # all: torch's scaler takes no DTensors beside plain tensors
            place = Shard(0) if shape else Replicate()
            values = distribute_tensor(values, init_device_mesh("cpu", (1,)), [place])
        return nn.Parameter(values)

    def _twin(self, param: Tensor) -> Tensor:
        return local(param).detach().clone().requires_grad_()

    def _make(self) -> None:
        groups: list[dict[str, Any]] = [
            {"name": g.name, "policy": g.policy, "params": [self.params[n] for n in g.names]}
            for g in self.groups
        ]
        self.clipper = Clipper(groups, modules=self.model, **self.options)
        self.in_a_row = self.num_skipped = 0
        self.seen = False  # the Clipper knows the optimizer

    # What happens to gradients --------------------------------------------------------------------

    @rule(seed=st.integers(0, 3), size=st.sampled_from(SIZES), left_out=st.integers(0, 15))
    def backward(self, seed: int, size: float, left_out: int) -> None:
        """Gradients are added to those that are there, in several sizes."""
        loss = torch.zeros(())
        generator = torch.Generator().manual_seed(seed)
        for index, param in enumerate(self.params.values()):
            values = torch.randn(param.shape, generator=generator, dtype=F64) * size
            if param.requires_grad and not (left_out >> 2 == index and left_out & 3):
                loss = loss + (local(param) * values.to(param.dtype)).double().sum()
        if loss.requires_grad:
            (self.scaler.scale(loss) if self.scaler else loss).backward()

    @rule(value=st.sampled_from(POISONS), at=st.integers(0, 30))
    def poison(self, value: float, at: int) -> None:
        grads = [local(p.grad) for p in self.params.values() if p.grad is not None]
        if grads := [g for g in grads if g.numel()]:
            grad = grads[at % len(grads)].detach()
            grad.view(-1)[at % grad.numel()] = value

    @rule(name=st.sampled_from([*SHAPES, *LATE]))
    def remove_gradient(self, name: str) -> None:
        self.params[name].grad = None

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)

    @rule(name=st.sampled_from([*SHAPES]))
    def freeze_or_unfreeze(self, name: str) -> None:
        self.params[name].requires_grad_(not self.params[name].requires_grad)

    # Steps ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.scaler is None)
    @rule(scale=st.sampled_from([None, None, 0.25, -2.0, 0.0, torch.tensor(3.0)]))
    def clip(self, scale: Any) -> None:
        """Without an optimizer: what only the optimizer got is not clipped yet."""
        self._call("clip_", lambda: self.clipper.clip_(scale=scale), scale)

    @rule(
        how=st.sampled_from(["clip_", "step", "decide", "attach", "attach"]),
        scale=st.sampled_from([None, None, 0.25, torch.tensor(3.0)]),
    )
    def step(self, how: str, scale: Any) -> None:
        """A whole step of the training loop."""
        self._follow()
        if how == "attach":
            self._step_attached()
            return
        self._detach()
        clipper, optimizer, scaler = self.clipper, self.optimizer, self.scaler
        if how == "step":
            call = lambda: clipper.step(optimizer, scaler, scale)  # noqa: E731
        elif how == "clip_":
            call = lambda: clipper.clip_(optimizer, scaler, scale)  # noqa: E731
        else:
            call = lambda: applied(clipper.decide(optimizer, scaler, scale))  # noqa: E731
        self._call(how, call, scale, steps=True)

    @rule(
        how=st.sampled_from(["clip_", "step", "decide", "attach"]),
        batches=st.lists(
            st.tuples(
                st.integers(0, 3),
                st.sampled_from([0.0, 0.3, 0.3, 0.6, 1.0, 4.0, 100.0]),
                st.sampled_from([None, None, None, None, *POISONS]),
            ),
            min_size=3,
            max_size=8,
        ),
    )
    def train(self, how: str, batches: list[tuple[int, float, float | None]]) -> None:
        """Several steps, as loops take them: what policies remember counts from the third on."""
        for seed, size, poison in batches:
            self.model.zero_grad()
            self.backward(seed, size, 15)
            if poison is not None:
                self.poison(poison, seed)
            self.step(how, None)
            self.states_are_those_of_the_reference()

    def _step_attached(self) -> None:
        if self.attached is None:
            self.attached = self.clipper.attach(self.optimizer)
            self.seen = True

        def call() -> Any:
            if self.scaler:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
            return self.attached.report

        mine = [local(self.params[n].grad) for n in self.stepped if self.params[n].grad is not None]
        if self.scaler and not self.folds and not all(bool(g.isfinite().all()) for g in mine):
            call()  # the scaler skips, and the Clipper is not asked
            self._end_step()
            return
        self._call("attach", call, None, steps=True)

    def _detach(self) -> None:
        if self.attached is not None:
            self.attached.remove()
            self.attached = None

    def _follow(self) -> None:
        """What the optimizer got since the last step belongs to the one group now."""
        held = {name for group in self.groups for name in group.names}
        self.groups[0].names += [name for name in self.stepped if name not in held]

    def _call(  # noqa: PLR0915
        self, how: str, call: Callable[[], Any], scale: Any, steps: bool = False
    ) -> None:
        """Calls it, and compares all that it did with the reference."""
        has_scaler = steps and self.scaler is not None and self.scaler._scale is not None
        if steps and self.scaler is not None and not has_scaler:
            return  # no loss was scaled yet, and torch's scaler would raise
        mine = [self.params[name] for name in self.stepped]
        if has_scaler and all(param.grad is None for param in mine):
            return  # torch's scaler asserts that there are some
        self.seen = self.seen or steps
        factor = 1.0 if scale is None else float(scale)
        factor /= self.scaler.get_scale() if has_scaler else 1.0
        raw = {n: local(p.grad).double() for n, p in self.params.items() if p.grad is not None}
        untouched = {n: local(p.grad).clone() for n, p in self.params.items() if n in raw}
        weights = {n: local(p).detach().double().clone() for n, p in self.params.items()}
        read = {
            n: w if n in raw or self.params[n].requires_grad else w * 0 for n, w in weights.items()
        }
        held = {name for group in self.groups for name in group.names}
        grads = {n: g * factor for n, g in raw.items() if n in held}
        want = expected(self.groups, read, grads, self.single)
        in_step = how in ("step", "attach")
        error = None
        try:
            report = call()
        except (NonFiniteGradientError, SkippedStepsError) as raised:
            report, error = None, raised
        vetoed = want.vetoed
        if vetoed is None:
            assert report is not None
            vetoed = bool(report.skipped)
        accepted = want.finite and not vetoed
        note(f"{how}: total {want.total}, finite {want.finite}, vetoed {vetoed}")
        if error is not None or self._raises(want.finite, vetoed):
            self._check_error(error, want, vetoed)
            self._count(want.finite, vetoed)
            unscaled = self.stepped if how == "attach" and has_scaler and not self.folds else ()
            left = {n: g.double() * (factor if n in unscaled else 1) for n, g in untouched.items()}
            self._assert_gradients(untouched, left, held)
            self._end_step()
            return
        self._count(want.finite, vetoed)
        if accepted:
            for group, step in zip(self.groups, want.groups, strict=True):
                group.plain.count(step.seen)
        self._check_report(report, want, vetoed)
        ClipperMachine.num_compared += 1
        left = self._gradients_after(untouched, grads, want, vetoed)
        is_known = self.mode != "propagate" or not any(map(is_unclear, want.groups))
        if not in_step and is_known:
            self._assert_gradients(untouched, left, held)
        if steps:
            skips = not accepted if has_scaler else bool(report.skipped)
            if not in_step and has_scaler:
                assert self.scaler is not None
                self.scaler.step(self.optimizer)
            elif not in_step and not skips:
                self.optimizer.step()
            if how == "attach" and has_scaler and not self.folds and not want.finite:
                # The scaler saw the elements alone, which are finite: whether the step counts
                # depends on how torch rounds them.
                self._repair()
                self._end_step()
                return
            self._check_parameters(left, skips, want, weights, is_known)
            self._end_step()

    def _raises(self, finite: bool, vetoed: bool) -> bool:
        if self.mode == "raise" and not finite:
            return True
        return self._is_counted(finite, vetoed) and self.in_a_row + 1 > self.most_skips

    def _vetoes(self) -> bool:
        return any("spike" in n for g in self.groups for n, p in POLICIES.items() if p is g.policy)

    def _is_counted(self, finite: bool, vetoed: bool) -> bool:
        return vetoed or (not finite and self.mode in ("skip", "zero"))

    def _count(self, finite: bool, vetoed: bool) -> None:
        if self.mode in ("skip", "zero") or self._vetoes():
            counted = self._is_counted(finite, vetoed)
            self.in_a_row = self.in_a_row + 1 if counted else 0
            self.num_skipped += counted

    def _check_error(self, error: Exception | None, want: Step, vetoed: bool) -> None:
        assert error is not None, "no error was raised"
        kind = NonFiniteGradientError if not want.finite else SkippedStepsError
        assert type(error) is kind
        assert self._raises(want.finite, vetoed), error

    def _gradients_after(
        self,
        untouched: dict[str, Tensor],
        grads: dict[str, Tensor],
        want: Step,
        vetoed: bool,
    ) -> dict[str, Tensor]:
        """What optimizers read after the call, float64, by name."""
        left = {name: grad.double() for name, grad in untouched.items()}
        if vetoed or (not want.finite and self.mode == "skip"):
            return left  # without the scale, too
        if not want.finite and self.mode == "zero":
            return left | {name: torch.zeros_like(grad) for name, grad in grads.items()}
        return left | want.clipped

    def _end_step(self) -> None:
        if self.scaler is not None:
            if self.scaler._scale is not None and self._found():
                self.scaler.update()
                if self.scaler.get_scale() < 1e-6:  # in the end its reciprocal would be infinite
                    self.scaler.update(1024.0)
            self.model.zero_grad()
        if not all(bool(local(p).isfinite().all()) for p in self.params.values()):
            self._repair()

    def _found(self) -> bool:
        assert self.scaler is not None
        state = self.scaler._per_optimizer_states[id(self.optimizer)]
        return bool(state["found_inf_per_device"])

    def _repair(self) -> None:
        """What users do after a step with NaN: another start."""
        with torch.no_grad():
            for name, param in self.params.items():
                local(param).nan_to_num_(0.5, 0.5, 0.5)
                self.twins[name].copy_(local(param))
        self.optimizer.state.clear()
        self.twin.state.clear()

    # Comparisons ----------------------------------------------------------------------------------

    def _assert_gradients(
        self, untouched: dict[str, Tensor], left: dict[str, Tensor], held: set[str]
    ) -> None:
        for name, before in untouched.items():
            now, grad = local(self.params[name].grad), left[name]
            if name not in held or torch.equal(grad, before.double()):
                torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
                continue
            close = {"rtol": CLOSE[now.dtype], "atol": 1e-37}
            torch.testing.assert_close(
                now.double(), grad.to(now.dtype).double(), equal_nan=True, **close
            )

    def _check_report(self, report: Any, want: Step, vetoed: bool) -> None:
        leaves = vetoed or (not want.finite and self.mode in ("skip", "zero"))
        fixed = 1.0 if vetoed or self.mode == "skip" else 0.0
        same(report.total_norm, want.total, self.single)
        assert bool(report.finite) == want.finite
        assert bool(report.skipped) == (vetoed or (not want.finite and self.mode == "skip"))
        coefficients = []
        for group, step in zip(self.groups, want.groups, strict=True):
            same(report.norms[group.name], step.norm, self.single)
            if not is_unclear(step) and not math.isnan(step.norm):
                same(report.limits[group.name], smallest(step.limits or [math.inf]), self.single)
            found = smallest([fixed] if leaves else step.coefficients or [1.0])
            if leaves or not is_unclear(step):
                same(report.coefficients[group.name], found, self.single)
            coefficients.append(found)
        if leaves or not any(map(is_unclear, want.groups)):
            same(report.coefficient, smallest(coefficients), self.single)
        assert self.clipper.skipped.item() == self.num_skipped
        broken = [
            name
            for group, step in zip(self.groups, want.groups, strict=True)
            if not step.norm <= (FLOAT32_MAX if self.single else math.inf) or math.isinf(step.norm)
            for name in group.names
            if self.params[name].grad is not None
        ]
        assert want.finite <= (report.nonfinite_parameters() == {})
        assert set(report.nonfinite_parameters()) <= set(broken)
        self.kept = report, report.to_dict()

    def _check_parameters(
        self,
        left: dict[str, Tensor],
        skips: bool,
        want: Step,
        weights: dict[str, Tensor],
        is_known: bool,
    ) -> None:
        """The optimizer did what its twin does with the gradients of the reference."""
        least = min((c for each in want.groups for c in each.coefficients), default=1.0)
        is_known = is_known and not (
            self.folds and least < 1e-36
        )  # then folded as 0, as documented
        if not skips:
            for name, twin in self.twins.items():
                twin.grad = left[name].to(twin.dtype) if name in left else None
            self.twin.step()
        for name, param in self.params.items():
            now, twin = local(param).detach(), self.twins[name].detach()
            if (is_known or skips) and now.numel():
                moved = (twin.double() - weights[name]).abs().nan_to_num(posinf=0.0).max()
                close, far = CLOSE[now.dtype], 100 * CLOSE[now.dtype] * float(moved)
                torch.testing.assert_close(now, twin, rtol=close, atol=far, equal_nan=True)
            twin.copy_(now)

    # States ---------------------------------------------------------------------------------------

    @rule(target=saves, how=st.sampled_from(["as it is", "torch.save", "lists"]))
    def save(self, how: str) -> Any:
        saved = self.clipper.state_dict()
        if how == "torch.save":
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        elif how == "lists":
            saved = as_lists(saved)
        return saved, copy.deepcopy(self.groups)

    @rule(saved=saves, new=st.booleans())
    def load(self, saved: Any, new: bool) -> None:
        state, groups = saved
        if new:
            self._detach()
            self._follow()
            self._make()
            for group in self.groups:
                group.plain = Group.made("", group.policy, []).plain
        before = str(self.clipper.state_dict())
        held = {name: p for name, p in self.clipper.state_dict()["groups"].items()}
        misses = [n for n, policy in held.items() if lacks(policy, state["groups"][n])]
        if misses:
            with pytest.raises(ValueError, match="Nothing was loaded"):
                self.clipper.load_state_dict(state)
            assert str(self.clipper.state_dict()) == before
            return
        self.clipper.load_state_dict(state)
        for group, was in zip(self.groups, groups, strict=True):
            group.plain = copy.deepcopy(was.plain)

    @precondition(lambda self: self.num_groups == 1 and self.seen)
    @rule(name=st.sampled_from([*LATE]))
    def add_param_group(self, name: str) -> None:
        if name not in self.stepped:
            self.stepped.append(name)
            self.optimizer.add_param_group({"params": [self.params[name]]})
            self.twin.add_param_group({"params": [self.twins[name]]})

    @invariant()
    def states_are_those_of_the_reference(self) -> None:
        if not hasattr(self, "clipper"):
            return
        saved = self.clipper.state_dict()["groups"]
        for group in self.groups:
            (found,) = saved[group.name].values()
            same_state(found, group.plain.saved(), group)

    @invariant()
    def a_report_stays_as_it_was(self) -> None:
        if getattr(self, "kept", None) is not None:
            report, figures = self.kept
            assert repr(report.to_dict()) == repr(figures)

    def teardown(self) -> None:
        if hasattr(self, "clipper"):
            self._detach()


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def applied(decision: Any) -> Any:
    decision.apply_()
    return decision.report


def is_unclear(step: GroupStep) -> bool:
    """Whether a limit follows from norms of which one is infinite or NaN: nothing says how."""
    has_nan = any(map(math.isnan, step.limits or []))
    return len(step.seen.norms) == 1 and not math.isfinite(step.norm) and has_nan


def smallest(numbers: list[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else min(numbers, default=math.inf)


def same(found: Tensor, wanted: float, single: bool, rtol: float = 2e-6) -> None:
    dtype = torch.float32 if single else F64
    assert found.dtype is dtype
    want = torch.tensor(wanted, dtype=F64).to(dtype)
    torch.testing.assert_close(found, want, rtol=rtol, atol=1e-37, equal_nan=True)


def as_lists(saved: Any) -> Any:
    if isinstance(saved, dict):
        return {key: as_lists(value) for key, value in saved.items()}
    return saved.tolist() if isinstance(saved, Tensor) else saved


def lacks(held: Any, saved: Any) -> bool:
    """Whether a tensor's own number is missing in `saved`."""
    return isinstance(held, dict) and any(k not in saved or lacks(held[k], saved[k]) for k in held)


def same_state(found: Any, wanted: Any, group: Group, rtol: float = 1e-6) -> None:
    if isinstance(wanted, dict):
        for key, value in found.items():
            default = math.inf if key in group.names else None  # no gradient yet
            same_state(value, wanted.get(key, default), group, rtol)
        return
    want = torch.tensor(wanted, dtype=F64)
    torch.testing.assert_close(found.double(), want, rtol=rtol, atol=1e-37)
