"""The dense values of gradients on this rank, and the key under which plans are kept."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from distclip.sharding.local_tensors import (
    any_unreduced,
    final_gradient,
    groups_sharding,
    layout_cache_key,
    local_gradient,
    local_gradients,
    local_values,
    reducible,
    unreduced_text,
)
from distclip.sharding.partial_gradients import reduce_gradients_
from tests.support.ranks import Ranks, device_of, mesh


def on_mesh(placement: Placement, device: str) -> DTensor:
    """A tensor of shape [8, 8], of ones before a sum over the ranks."""
    shape = [8, 8]
    if isinstance(placement, Shard):
        shape[placement.dim] //= 4
    local = torch.ones(shape, device=device_of(device))
    return DTensor.from_local(local, mesh((4,), ("dp",), device), [placement], run_check=False)


def with_gradient(param: Tensor, grad: Tensor | None) -> nn.Parameter:
    made = nn.Parameter(param)
    made.grad = grad
    return made


def sparse_gradient() -> Tensor:
    index = torch.tensor([[0, 0]])
    return torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0]), (3,), check_invariants=True)


def every_kind(device: str) -> list[nn.Parameter]:
    """Made anew for each use: reading replaces a `Partial` gradient."""
    shared = with_gradient(on_mesh(Shard(0), device), on_mesh(Shard(0), device))
    shared.grad._spec = shared._spec  # as FSDP2 makes it
    return [
        with_gradient(torch.zeros(3), torch.ones(3)),
        with_gradient(torch.zeros(3), None),
        with_gradient(torch.zeros(3), sparse_gradient()),
        shared,
        with_gradient(on_mesh(Shard(0), device), on_mesh(Shard(0), device)),
        with_gradient(on_mesh(Replicate(), device), on_mesh(Partial(), device)),
        with_gradient(on_mesh(Shard(0), device), on_mesh(Shard(1), device)),
        with_gradient(on_mesh(Shard(0), device), None),
    ]


def all_at_once(device: str) -> None:
    kinds, again = every_kind(device), every_kind(device)
    found = local_gradients(kinds)
    for values, param in zip(found, again, strict=True):
        want = local_gradient(param)
        assert type(values) is type(want)
        if want is not None:
            torch.testing.assert_close(values, want, rtol=0, atol=0)
    assert [type(values) is DTensor for values in found] == [*[False] * 5, True, True, False]
    assert any_unreduced(found)
    assert not any_unreduced(reducible(found))
    assert unreduced_text(found).startswith("5: (Partial(sum),) torch.float32, 6: (Shard(dim=1),)")
    reduced = reduce_gradients_(kinds, everywhere=True, alike=True)
    assert unreduced_text(reduced) == ""
    assert [values is None for values in reduced] == [values is None for values in found]
    for param in kinds:
        if isinstance(param.grad, DTensor):
            assert param.grad.placements == param.placements
            values = local_gradient(param)
            values.fill_(7)  # the memory of the gradient itself
            assert bool((param.grad.to_local() == 7).all())


def test_thousands_of_gradients_are_read_as_one_is(four_ranks: Ranks) -> None:
    four_ranks.run(all_at_once, four_ranks.device)


def partial_is_never_local(device: str) -> None:
    """Also where parameter and gradient share one spec."""
    param = with_gradient(on_mesh(Partial(), device), on_mesh(Partial(), device))
    param.grad._spec = param._spec
    assert local_gradients([param]) == [param.grad]
    assert local_values(param.grad)[0, 0] == 4  # the sum over the ranks
    (values,) = reduce_gradients_([param], everywhere=True, alike=False)
    assert values[0, 0] == 4
    assert param.grad.placements == (Replicate(),)


def test_partial_values_are_reduced(four_ranks: Ranks) -> None:
    four_ranks.run(partial_is_never_local, four_ranks.device)


def finality(device: str) -> None:
    final = [final_gradient(param) is not None for param in every_kind(device)]
    assert final == [True, False, False, True, True, False, False, False]


def test_a_gradient_that_needs_a_collective_is_not_final(four_ranks: Ranks) -> None:
    four_ranks.run(finality, four_ranks.device)


def groups(device: str) -> None:
    both = mesh((2, 2), ("dp", "tp"), device)
    local = torch.ones(2, 2, device=device_of(device))
    tensor = DTensor.from_local(local, both, [Shard(0), Replicate()], run_check=False)
    assert groups_sharding(tensor, [0]) == [both.get_group("dp")]
    assert groups_sharding(tensor, [1]) == []
    assert groups_sharding(local, [0]) == []


def test_groups_that_shard_a_dim(four_ranks: Ranks) -> None:
    four_ranks.run(groups, four_ranks.device)


def keys(device: str) -> None:
    plain = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    sharded = nn.Parameter(on_mesh(Shard(0), device))
    copied = nn.Parameter(on_mesh(Replicate(), device))
    key, specs = layout_cache_key([*plain, sharded])
    assert layout_cache_key([*plain, sharded]).key == key
    assert specs == [sharded._spec]  # and none for plain tensors: None has no weak reference
    assert layout_cache_key([sharded, copied]).specs == [sharded._spec, copied._spec]
    wide = [nn.Parameter(param.detach().double()) for param in plain]
    for unlike in ([*plain, copied], [*plain, *plain], [sharded, *plain], [*wide, sharded]):
        assert layout_cache_key(unlike).key != key


def test_the_key_tells_layouts_apart(four_ranks: Ranks) -> None:
    four_ranks.run(keys, four_ranks.device)


class Unknown(nn.Parameter):
    pass


def test_a_class_of_its_own_does_not_show_its_layout() -> None:
    assert layout_cache_key([nn.Parameter(torch.zeros(2)), Unknown(torch.zeros(2))]) is None


def specs_are_weakly_referenced(device: str) -> None:
    on = mesh((4,), ("dp",), device)
    # Made without an operator: torch keeps the specs of operators' results.
    spec = DTensorSpec(on, (Shard(0),), TensorMeta(torch.Size((8, 8)), (8, 1), torch.float32))
    param = DTensor(torch.ones(2, 8, device=device_of(device)), spec, requires_grad=False)
    gone: list[object] = []
    refs = [weakref.ref(spec, gone.append) for spec in layout_cache_key([param]).specs]
    assert [ref() for ref in refs] == [spec]
    del param, spec
    assert gone == refs


def test_specs_can_be_weakly_referenced(four_ranks: Ranks) -> None:
    four_ranks.run(specs_are_weakly_referenced, four_ranks.device)
