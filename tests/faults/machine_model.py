"""The first part of the state machine: a model, its Clipper, and what happens to gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distclip import Clipper
from tests.faults.comparing import F64, local
from tests.faults.drawn_policies import LATE, OPTIMIZERS, POISONS, POLICIES, SHAPES, SIZES, VETOES
from tests.faults.plain_steps import Group


class ModelMachine(RuleBasedStateMachine):
    """A model in training, and a twin of it that steps with the reference's gradients."""

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
