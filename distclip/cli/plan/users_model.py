"""The model that a user's function makes on one simulated rank."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy

from distclip.arguments import shown
from distclip.cli.console import UserError
from distclip.cli.plan.records import DEFAULT_POLICY, Request
from distclip.cli.plan.users_code import Function, users_code
from distclip.clipper import Clipper
from distclip.sharding.fsdp2 import shard_
from distclip.sharding.mesh import axis_names
from distclip.sharding.read import named_parameters
from distclip.sharding.stage_mesh import any_dtensor

SHARDED_AXES = ("fsdp", "dp_shard")
COPIED_AXES = ("dp", "ddp", "dp_replicate")


def make_clipper(request: Request, mesh: DeviceMesh) -> Clipper:
    """The Clipper of the model that the user's function makes on this rank.

    Raises:
        UserError: the function raises or returns something else, or nobody knows how to shard or
            clip what it returns.
    """
    target = request.target
    with users_code(f"cannot read the arguments of {target}"):
        pass_mesh = _takes_mesh(request.function, target)
    with users_code(f"cannot make a model with {target}"), torch.device("meta"):
        made = request.function(mesh) if pass_mesh else request.function()
    if isinstance(made, Clipper):
        return _checked(made, request)
    with users_code(f"cannot read the model of {target}"):
        modules = _modules(made, target)
        named = [each for module in modules for each in named_parameters(module)]
    shows_mesh = any_dtensor(param for _, param in named)
    if not pass_mesh and not shows_mesh:
        for module in modules:
            _shard(module, mesh, target)
    with users_code(f"cannot clip the model of {target}"):
        return Clipper(
            modules[0] if len(modules) == 1 else named,
            request.policy,
            mesh=mesh if pass_mesh or not shows_mesh else None,
            tensor_norms=request.tensor_norms,
            modules=modules,
        )


def _takes_mesh(function: Function, target: str) -> bool:
    """Whether it needs an argument, or its first one is named `mesh`."""
    try:
        params = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions of C do not say it
        return False
    positional = [p for p in params if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [
        p
        for p in params
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1 or (needed and needed != positional[:1]):
        names = ", ".join(p.name for p in needed)
        raise UserError(
            f"--model {target}: it needs the arguments {names}. Write a function that takes the "
            f"DeviceMesh alone and returns the sharded model, or that takes nothing"
        )
    return bool(needed) or (bool(positional) and positional[0].name.endswith("mesh"))


def _checked(clipper: Clipper, request: Request) -> Clipper:
    if request.tensor_norms or request.policy != DEFAULT_POLICY:
        raise UserError(
            f"--model {request.target}: it returned a Clipper, which has a policy and "
            f"`tensor_norms` of its own. Leave out --policy and --tensor-norms"
        )
    return clipper


def _modules(made: Any, target: str) -> list[nn.Module]:
    """A model, or the parts of a pipeline stage."""
    modules = list(cast("Sequence[Any]", made)) if isinstance(made, list | tuple) else [made]
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise UserError(
            f"--model {target}: it returned {shown(made)}, not an nn.Module, a list of them or a "
            f"distclip.Clipper"
        )
    if any(is_lazy(param) for module in modules for param in module.parameters()):
        raise UserError(
            f"--model {target}: its model has lazy parameters, which get their shapes in the first "
            f"forward. Give the modules their sizes"
        )
    return modules


def _shard(model: nn.Module, mesh: DeviceMesh, target: str) -> None:
    """FSDP2 over the axis that is named for it. Other axes of these names hold copies."""
    sizes = dict(zip(axis_names(mesh), mesh.mesh.shape, strict=True))
    axes = [axis for axis, size in sizes.items() if size > 1]
    unknown = [axis for axis in axes if axis not in (*SHARDED_AXES, *COPIED_AXES)]
    sharded = [axis for axis in axes if axis in SHARDED_AXES]
    if unknown or len(sharded) > 1:
        axis = unknown[0] if unknown else sharded[1]
        raise UserError(
            f"--mesh {axis}={sizes[axis]}: a plain model does not say how ranks along {axis!r} "
            f"share it. Write a function that takes the mesh, `def build(mesh): ...`, and returns "
            f"the model as you shard it"
        )
    if sharded:
        with users_code(f"cannot shard the model of {target} with fully_shard"):
            shard_(model, mesh[sharded[0]])
