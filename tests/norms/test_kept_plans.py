"""The drop-in functions keep plans: right for other parameters, other limits, and never keeping a
model alive.
"""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import api
from distclip.norms import kept_plans
from distclip.norms.kept_plans import PlanCache, plans_of
from tests.support import reference
from tests.support.ranks import Ranks, mesh
from tests.support.torch_versions import MESH_ROOTS


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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each plan that the functions make."""
    made: list[int] = []
    make_plan = api.make_plan
    monkeypatch.setattr(kept_plans, "_without_mesh", PlanCache())
    monkeypatch.setattr(api, "make_plan", lambda *args: made.append(1) or make_plan(*args))
    return made


def test_a_limit_that_changes_every_step_makes_no_new_plan(made: list[int]) -> None:
    for step in range(5):
        distclip.clip_grad_norm_([param_with(3.0, 4.0), param_with(1.0)], 1.0 + step)
    assert len(made) == 1


def test_the_total_norm_uses_kept_plans(made: list[int]) -> None:
    for value in (3.0, 4.0, 5.0):
        norm = distclip.get_total_norm([torch.tensor([value]), torch.tensor([value])])
        torch.testing.assert_close(norm, torch.tensor(value * 2**0.5))
        model = nn.Linear(1, 1)
        model.weight.grad, model.bias.grad = torch.tensor([[value]]), torch.tensor([value])
        torch.testing.assert_close(distclip.get_total_norm(model), torch.tensor(value * 2**0.5))
    assert len(made) == 1


def test_another_norm_type_has_another_plan(made: list[int]) -> None:
    for norm_type, norm in ((1.0, 7.0), (2.0, 5.0), (float("inf"), 4.0), (1.0, 7.0)):
        found = distclip.clip_grad_norm_([param_with(3.0, 4.0)], 100.0, norm_type)
        torch.testing.assert_close(found, torch.tensor(norm))
    assert len(made) == 3


def test_few_plans_are_kept(made: list[int]) -> None:
    for length in range(1, 40):
        distclip.clip_grad_norm_([param_with(1.0) for _ in range(length)], 1.0)
    assert len(kept_plans._without_mesh._entries) == kept_plans._MAX_PLANS
    before = len(made)
    for length in (39, 38):  # the latest ones
        distclip.clip_grad_norm_([param_with(1.0) for _ in range(length)], 1.0)
    assert len(made) == before


def test_kept_plans_work_under_threads(made: list[int]) -> None:
    """Eight threads with more kinds of parameters than plans are kept."""

    def clip(seed: int) -> list[float]:
        lengths = [1 + (seed * 7 + call * 5) % (2 * kept_plans._MAX_PLANS) for call in range(200)]
        norms = []
        for length in lengths:
            params = [param_with(2.0) for _ in range(length)]
            norms.append(distclip.clip_grad_norm_(params, 1.0) / length**0.5)
        return [float(norm) for norm in norms]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(clip, range(8)))
    torch.testing.assert_close(torch.tensor(found), torch.full((8, 200), 2.0))


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
        torch.testing.assert_close(
            distclip.get_total_norm([g.grad for g in given]), torch.tensor(5.0)
        )
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
    for on, num_ranks in ((alone, 2), (both["tp"], 4), (alone, 2), (both["tp"], 4)):
        param = nn.Parameter(distribute_tensor(torch.zeros(4), on, [Shard(0)], src_data_rank=None))
        param.grad = distribute_tensor(torch.full((4,), 1.0), on, [Shard(0)], src_data_rank=None)
        torch.testing.assert_close(distclip.clip_grad_norm_([param], 100.0), torch.tensor(2.0))
        kept = [entry.plan.reduce_mesh for entry in plans_of(param._spec.mesh)._entries.values()]
        assert [each.ranks.numel() for each in kept] == [num_ranks]


def one_plan_for_many_calls() -> None:
    on, make, calls = mesh((2, 2), ("dp", "tp")), api._make_plan, []
    api._make_plan = lambda *args: calls.append(args) or make(*args)
    try:
        for _ in range(3):
            whole = torch.zeros(8)
            param = nn.Parameter(distribute_tensor(whole, on, [Replicate(), Shard(0)]))
            param.grad = distribute_tensor(whole + 1.0, on, [Replicate(), Shard(0)])
            distclip.clip_grad_norm_([param], 1.0)
    finally:
        api._make_plan = make
    assert len(calls) == 1


def test_sharded_models_share_a_plan(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(one_plan_for_many_calls)


def plans_of_layouts_that_are_gone() -> None:
    """Another layout could take over the id of one that is gone, and be given its plan."""
    on = mesh((4,), ("own",))
    spec = DTensor.from_local(torch.zeros(4), on, [Shard(0)])._spec
    cache, plan = PlanCache(), distclip.Clipper([param_with(1.0)]).plan
    cache.put("key", plan, [spec])
    assert cache.get("key") is not None
    del spec
    gc.collect()
    assert cache.get("key") is None


def test_plans_of_layouts_that_are_gone(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(plans_of_layouts_that_are_gone)


def meshes_go() -> None:
    """Nothing of distclip keeps a mesh, a model or an optimizer alive; no collection is needed."""
    on = DeviceMesh("cpu", list(range(4)), mesh_dim_names=("dp",))
    param = nn.Parameter(distribute_tensor(torch.zeros(4), on, [Shard(0)], src_data_rank=None))
    param.grad = torch.ones_like(param)
    for _ in range(2):
        distclip.clip_grad_norm_([param], 100.0)
        distclip.get_total_norm([param.grad], mesh=on)
    assert len(plans_of(on)._entries) == 2
    caches = weakref.ref(plans_of(on))
    clipper, optimizer = distclip.Clipper([param]), torch.optim.AdamW([param], fused=True)
    report = clipper.step(optimizer)
    gone = [weakref.ref(each) for each in (on, param, clipper, optimizer, clipper.plan)]
    gc.collect()
    gc.disable()
    try:
        del on, param, clipper, optimizer
        left = [ref() for ref in gone if ref() is not None]
        # torch's own caches of DTensor keep a mesh, and it keeps its plans; a parameter must go.
        assert gone[1]() is None, left
        assert gone[2]() is None, left
        assert gone[3]() is None, left
        assert gone[4]() is None, left
    finally:
        gc.enable()
    assert float(report.total_norm) == 2.0
    assert (caches() is None) == (gone[0]() is None)


def test_meshes_go(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(meshes_go)


def gradients_that_their_parameters_layout_does_not_tell() -> None:
    on = mesh((4,), ("own",))
    copied = nn.Parameter(distribute_tensor(torch.zeros(8), on, [Replicate()], src_data_rank=None))
    copied.grad = distribute_tensor(torch.arange(8.0), on, [Shard(0)], src_data_rank=None)
    torch.testing.assert_close(distclip.clip_grad_norm_([copied], 100.0), torch.arange(8.0).norm())
    partial = nn.Parameter(DTensor.from_local(torch.zeros(4), on, [Partial()]))
    partial.grad = DTensor(
        torch.ones(4), partial._spec, requires_grad=False
    )  # one spec, as FSDP2 has it
    torch.testing.assert_close(distclip.clip_grad_norm_([partial], 100.0), torch.tensor(8.0))


def test_gradients_that_their_parameters_layout_does_not_tell(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(gradients_that_their_parameters_layout_does_not_tell)


@MESH_ROOTS.skips
def test_meshes_that_compare_equal(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(equal_meshes_with_two_roots)
