"""torch's private names, each with the public one that falls short, or with what would let it go.

The rest of distclip uses public names; what FSDP1 keeps private is read in `sharding/fsdp1.py`. No
name is read with a default: where a new torch has renamed one, the call fails and no norm turns
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

P = ParamSpec("P")
T = TypeVar("T")

_torch = cast(Any, torch)

# What FSDP1, activation checkpointing and torch.compile insert into the names of parameters. Each
# strips its own from state dicts, and nothing public strips them from names.
WRAPPER_ATTRIBUTES = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})

# DTensor.to_local() records an autograd node for each tensor, under `no_grad` too.
local_tensor: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")
# DTensor.device_mesh and .placements have to be compared; thousands of tensors share one spec.
dtensor_spec: Callable[[Tensor], Any] = attrgetter("_spec")


def local_tensor_of_shared_spec(param: Any, grad: Any, resolved: set[int]) -> Tensor | None:
    """The local tensor of a gradient that shares one spec with its parameter, as FSDP2 makes it.

    None if it does not, if it is `Partial`, or if a collective has yet to make its values. The two
    getters above, called for 2,000 gradients, would take 10 % more time than all of this.

    Args:
        param, grad: DTensors.
        resolved: the ids of specs without `Partial`, found so far; many parameters share one.
    """
    if (spec := grad._spec) is param._spec:
        if id(spec) not in resolved:
            if any(placement.is_partial() for placement in spec.placements):
                return None
            resolved.add(id(spec))
        if type(local := grad._local_tensor) is Tensor:
            return local
    return None


def spec_of_localized(param: Tensor) -> Any:
    """The spec of the DTensor that DDP has turned into this plain parameter; else None.

    Parameters that were no DTensors have no such attribute: a test pins that torch sets it.
    """
    return getattr(param, "_st_info", None)


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and under FakeTensorMode, as estimators of memory use them.

    No public name tells a fake tensor from others.
    """
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


# A DeviceMesh holds its ranks as a tensor, which is real under FakeTensorMode too.
with_real_values = unset_fake_temporarily

# Tensors inside `torch.func`: under `vmap` one stands for many, and none can be read.
is_transformed: Callable[[Tensor], bool] = _torch._C._functorch.is_functorch_wrapped_tensor


def host_has_values(tensor: Tensor) -> bool:
    """Whether the host can read the values, and needs not wait for them."""
    return tensor.is_cpu and not isinstance(tensor, FakeTensor) and not is_transformed(tensor)


def on_device(scalar: Tensor, device: torch.device) -> Tensor:
    """`scalar` on `device`, without a wait for an accelerator if it lies on the CPU.

    A copy from memory that is not pinned waits; a fill with its value does not.
    """
    if device.type in ("cpu", "meta") or not host_has_values(scalar):
        return scalar.to(device)
    return torch.full((), scalar.item(), dtype=scalar.dtype, device=device)


# No public name tells whether an operator has written to a tensor.
version: Callable[[Tensor], int] = attrgetter("_version")
# The memory of a tensor that torch negates lazily; `resolve_neg` makes a copy.
neg_view: Callable[[Tensor], Tensor] = _torch._neg_view
# torch.optim is made of them. torch.nn.utils.get_total_norm gives no float64 norm of float32.
foreach_norm: Callable[..., list[Tensor]] = _torch._foreach_norm
foreach_mul_: Callable[..., None] = _torch._foreach_mul_


def outside_of_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which Dynamo does not trace: a graph breaks before it and goes on after it.

    `torch.compiler.disable` imports torch._dynamo where it decorates, which takes a second. This
    imports it in the first call, as every optimizer of torch does when it is made.
    """
    return _torch._disable_dynamo(function)


def queue_after_backward(call: Callable[[], None]) -> None:
    """Calls when the running backward has ended, after what was queued before.

    Goes when DDP has a public hook for the moment in which it has written `.grad`.
    """
    _torch.autograd.Variable._execution_engine.queue_callback(call)


def loss_scale(scaler: GradScaler) -> Tensor | None:
    """The scale on its device, None before the first `scale()`; `get_scale()` would wait."""
    return cast(Any, scaler)._scale


def scale_and_growth(scaler: GradScaler) -> tuple[Tensor, Tensor]:
    """What `update` changes, after the first `scale()`."""
    return cast(Any, scaler)._scale, cast(Any, scaler)._growth_tracker


def scaler_state(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any]:
    """`stage` and `found_inf_per_device` of an optimizer; in public only `unscale_` writes them."""
    return cast(Any, scaler)._per_optimizer_states[id(optimizer)]


def takes_scaled_gradients(optimizer: Optimizer) -> bool:
    """Whether GradScaler leaves scaling and skipping to the optimizer."""
    return hasattr(optimizer, "_step_supports_amp_scaling")


def root_mesh(mesh: Any) -> Any:
    """The DeviceMesh that `mesh` was sliced from; a slice has no public way to it."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed import device_mesh

    return cast(Any, device_mesh)._mesh_resources.get_root_mesh(mesh)  # goes with torch 2.9


# torch.nn.Module.named_parameters() takes ten times as long to tell whether a module has changed.
parameters_of: Callable[[nn.Module], dict[str, Any]] = attrgetter("_parameters")
children_of: Callable[[nn.Module], dict[str, Any]] = attrgetter("_modules")


def composable_modules() -> list[nn.Module]:
    """Every living module that `fully_shard` or `replicate` was applied to.

    Public names find them only below a module that is known.
    """
    from torch.distributed import _composable_state

    return list(cast(Any, _composable_state)._module_state_mapping)


def local_shape_and_offset(
    shape: Sequence[int], mesh: Any, placements: Sequence[Any]
) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and offset of this rank's block of a DTensor; nothing public has the offset."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with torch.device("cpu"):  # it computes with tensors of the default device
        return compute_local_shape_and_global_offset(tuple(shape), mesh, placements)


@contextmanager
def simulated_rank(rank: int, world_size: int) -> Generator[None]:
    """This process as one rank of many: under torch's fake process group collectives do nothing."""
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        if dist.is_initialized():  # what ran here may have ended it
            dist.destroy_process_group()
        # torch keeps the layouts of results by their inputs, and meshes of two ranks are equal: a
        # parameter of the next rank would get the coordinates of this one.
        cast(Any, debug)._clear_sharding_prop_cache()


def symmetric_memory() -> Any:
    """torch's memory that other ranks read and write. Goes when it has a public name."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph, or that of another accelerator, records what is called now."""
    if device.type in ("cpu", "meta"):
        return False
    device_module: Any = torch.get_device_module(device.type)
    asks = getattr(device_module, "is_current_stream_capturing", None)
    return asks is not None and bool(asks())


def timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """How long the collectives of a group wait; only `new_group` names it in public."""
    backend_of = cast(Any, group)._get_backend
    try:
        return backend_of(device).options._timeout
    except RuntimeError:  # it has none for the device, and gloo may be all that there is
        return backend_of(torch.device("cpu")).options._timeout


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """Of a group that has one for each type of device, as "cpu:gloo,cuda:nccl" gives it."""
    try:
        return cast(Any, group)._get_backend(device).name()
    except RuntimeError:  # it has none for the device
        return ""


def in_backward() -> bool:
    """Whether autograd runs a backward on this thread, as in a hook of a parameter."""
    return _torch._C._current_graph_task_id() != -1


def optimizers_in_backward(param: Tensor) -> list[Optimizer]:
    """Those of `torch.distributed.optim._apply_optimizer_in_backward`, which has no public form.

    Parameters without such optimizers have no such attribute: a test pins that torch sets it.
    """
    return getattr(param, "_in_backward_optimizers", [])


def has_hooks_after_accumulation(param: Tensor) -> bool:
    """Whether others than distclip have called `register_post_accumulate_grad_hook`."""
    hooks: dict[int, Any] = cast(Any, param)._post_accumulate_grad_hooks or {}
    modules = [str(getattr(each, "__module__", "")) for each in hooks.values()]
    return any(not module.startswith("distclip.") for module in modules)


def steps_in_bucket_hook(module: Any) -> bool:
    """Whether DDP steps those optimizers after the all-reduce of each bucket.

    Its first forward looks for them, and never again.
    """
    if not module._lazy_init_ran:
        return any(map(optimizers_in_backward, module.parameters()))
    names = [hook.__qualname__ for hook, _ in module._comm_hooks]
    return any(name.startswith("_apply_optim_in_backward_hook.") for name in names)
