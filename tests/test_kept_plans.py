"""The drop-in functions keep plans: right for other parameters, other limits, and never keeping a model alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import once
from tests.support import reference
from tests.support.ranks import Ranks, mesh


def param_with(*values: float) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(len(values)))
    param.grad = torch.tensor(values)
    return param


def test_other_parameters_and_other_limits() -> None:
    for length in (1, 2, 3, 3, 2):
        for limit in (0.5, 0.25):
            params = [param_with(3.0, 4.0) for _ in range(length)]
            norm = distclip.clip_grad_norm_(params, limit)
            torch.testing.assert_close(norm, torch.tensor(5.0 * length**0.5))
            after = reference.total_norm([p.grad for p in params])
            torch.testing.assert_close(after, torch.tensor(limit).double(), rtol=1e-5, atol=0)


def test_a_plan_is_made_once_for_parameters_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = once._plan
    monkeypatch.setattr(once, "_kept", type(once._kept)())
    monkeypatch.setattr(once, "_plan", lambda *args: made.append(1) or plan(*args))
    for _ in range(3):
        distclip.clip_grad_norm_([param_with(3.0, 4.0), param_with(1.0)], 1.0)
    assert len(made) == 1


def test_few_plans_are_kept() -> None:
    for length in range(1, 40):
        distclip.clip_grad_norm_([param_with(1.0) for _ in range(length)], 1.0)
    assert len(once._kept) <= once._KEPT


def test_no_parameter_is_kept_alive() -> None:
    model = nn.Linear(3, 3)
    model(torch.ones(3)).sum().backward()
    distclip.clip_grad_norm_(model, 0.1)
    distclip.clip_grad_norm_(model.parameters(), 0.1)
    alive = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_parameters_take_other_storage_without_a_complaint() -> None:
    """torch.utils.swap_tensors refuses tensors that anything refers to weakly."""
    first, second = param_with(3.0, 4.0), param_with(1.0)
    distclip.clip_grad_norm_([first], 1.0)
    torch.utils.swap_tensors(first, second)
    torch.testing.assert_close(distclip.clip_grad_norm_([first], 0.5), torch.tensor(1.0))


def test_a_parameter_twice_counts_once_again_and_again() -> None:
    param = param_with(3.0, 4.0)
    for given in ([param], [param, param], [param, param]):
        torch.testing.assert_close(distclip.get_total_norm([g.grad for g in given]), torch.tensor(5.0))
        torch.testing.assert_close(distclip.clip_grad_norm_(given, 100.0), torch.tensor(5.0))


def test_nan_is_named_by_its_own_model() -> None:
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.register_parameter(name, param_with(1.0, 2.0))

    distclip.clip_grad_norm_(Named("first"), 1.0)
    second = Named("second")
    second.second.grad[0] = torch.nan
    with pytest.raises(distclip.NonFiniteGradientError, match="'second'"):
        distclip.clip_grad_norm_(second, 1.0, error_if_nonfinite=True)


def equal_meshes_with_two_roots() -> None:
    """Pairs of ranks on a mesh of their own, and the same pairs as rows of a mesh over all."""
    rank = torch.distributed.get_rank()
    both = mesh((2, 2), ("dp", "tp"))
    rows = [DeviceMesh("cpu", row, mesh_dim_names=("tp",)) for row in ([0, 1], [2, 3])]
    alone = rows[rank // 2]
    for on, copies in ((alone, 1), (both["tp"], 1), (alone, 1), (both["tp"], 1)):
        param = nn.Parameter(distribute_tensor(torch.zeros(4), on, [Shard(0)], src_data_rank=None))
        param.grad = distribute_tensor(torch.full((4,), 1.0), on, [Shard(0)], src_data_rank=None)
        norm = distclip.clip_grad_norm_([param], 100.0)
        torch.testing.assert_close(norm, torch.tensor(2.0 * copies))
    expected = 2 if alone is not None else 0
    kept = [plan.reduce_mesh.ranks.numel() for plan, _ in once._kept.values() if plan.reduce_mesh is not None]
    assert {expected, 4} <= set(kept)


def what_a_key_names_stays_alive() -> None:
    """Another object could take over the id of one that is gone, and be given its plan."""
    param = nn.Parameter(distribute_tensor(torch.zeros(4), mesh((4,), ("own",)), [Shard(0)], src_data_rank=None))
    param.grad = torch.ones_like(param)
    distclip.clip_grad_norm_([param], 100.0)
    _, (specs, _, world) = list(once._kept.values())[-1]
    assert specs[0] is param._spec
    assert world is torch.distributed.group.WORLD


def test_what_a_key_names_stays_alive(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(what_a_key_names_stays_alive)


def gradients_that_their_parameters_layout_does_not_tell() -> None:
    on = mesh((4,), ("own",))
    copied = nn.Parameter(distribute_tensor(torch.zeros(8), on, [Replicate()], src_data_rank=None))
    copied.grad = distribute_tensor(torch.arange(8.0), on, [Shard(0)], src_data_rank=None)
    torch.testing.assert_close(distclip.clip_grad_norm_([copied], 100.0), torch.arange(8.0).norm())
    partial = nn.Parameter(DTensor.from_local(torch.zeros(4), on, [Partial()]))
    partial.grad = DTensor(torch.ones(4), partial._spec, requires_grad=False)  # one spec, as FSDP2 has it
    torch.testing.assert_close(distclip.clip_grad_norm_([partial], 100.0), torch.tensor(8.0))


def test_gradients_that_their_parameters_layout_does_not_tell(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(gradients_that_their_parameters_layout_does_not_tell)


def test_meshes_that_compare_equal(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(equal_meshes_with_two_roots)
