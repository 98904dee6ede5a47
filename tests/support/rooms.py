"""The rooms of distclip: what each may import, and who may name the parts of torch.

docs/architecture.md explains the rooms; tests/test_architecture.py holds the code to these tables.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from itertools import pairwise

from tests.support.imports import Package, Use

PUBLIC = "distclip"  # the package's own __init__.py

# A room is a file or a folder in distclip/. From the bottom to the top: room -> what it may import.
BOTTOM = {"errors", "torch_private", "arguments"}
NORMS = BOTTOM | {"sharding", "kernels", "policies"}
NONFINITE = NORMS | {"norms", "report"}
LIMITS = NONFINITE | {"nonfinite"}
DECISION = NONFINITE | {"nonfinite", "parameters", "scaling"}
STEP = LIMITS | DECISION | {"limits", "decision"}
GROUPS = BOTTOM | {"sharding", "policies", "parameters"}
TRAINING = STEP | {"step", "param_groups"}
CLIPPER = TRAINING | {"training"}
API = CLIPPER | {"clipper"}
MAY_IMPORT: dict[str, set[str]] = {
    "arguments": {"errors"},
    "errors": set(),
    "torch_private": set(),
    "torch_version": set(),
    "version": set(),
    "report": BOTTOM,
    "policies": {"errors", "arguments"},
    "kernels": BOTTOM,
    "sharding": BOTTOM,
    "parameters": BOTTOM | {"sharding", "policies"},
    "param_groups": GROUPS,
    "norms": NORMS,
    "nonfinite": NONFINITE,
    "limits": LIMITS,
    "scaling": BOTTOM | {"sharding", "kernels", "norms"},
    "decision": DECISION,
    "step": STEP,
    "training": TRAINING,
    "clipper": CLIPPER,
    "api": API,
    "functional": API | {"api"},
    "parity": BOTTOM | {"sharding", "policies", "clipper", "api"},
    "monitoring": BOTTOM | {"version", "sharding", "policies", "norms", "report"},
    # And the public names of every room.
    "adapters": BOTTOM | {"policies", "sharding", "nonfinite", "decision", "step", "training"},
    "run": {"adapters"},
    "cli": API | {PUBLIC, "version", "api", "adapters", "monitoring"},
}

# The tables below name places: a room ("norms") or a module of one ("norms.reduce").
# What is not torch, the standard library or distclip -> where it may be imported.
THIRD_PARTY: dict[str, set[str]] = {
    **{name: {"kernels", "cli"} for name in ("triton", "numba", "llvmlite")},
    "numpy": {"kernels", "monitoring", "cli"},
    **{name: {"monitoring"} for name in ("matplotlib", "bokeh", "jinja2", "tensorboard", "wandb")},
    **{
        name: {"adapters"}
        for name in ["deepspeed", "lightning", "accelerate", "transformers", "torchtitan"]
    },
    "megatron": {"adapters"},
    **{name: {"cli"} for name in ("tyro", "rich")},
}

# What works on local tensors alone: no part of torch.distributed.
LOCAL = {
    "errors",
    "policies",
    "kernels",
    "norms.units",
    "norms.power_sums",
    "norms.measure",
    "step",
    "decision",
    "scaling",
}
# A part of torch.distributed -> where it may be named.
TORCH: dict[str, set[str]] = {
    "torch.distributed.tensor": {"sharding", "torch_private", "cli.doctor.ranks"},
    "torch.distributed.fsdp": {"sharding", "cli.doctor.ranks"},
}

# Calls that make ranks communicate -> where they may be made; during a step only in `norms.reduce`,
# and in what it calls.
EACH_STEP = """all_reduce all_reduce_coalesced all_gather_into_tensor all_gather_tensor all_to_all
    all_to_all_single reduce_scatter reduce_scatter_tensor full_tensor"""
AT_SETUP = """all_gather all_gather_object gather_object broadcast_object_list
    scatter_object_list monitored_barrier"""
CALLS: dict[str, set[str]] = {
    **{name: {"norms.reduce", "sharding.rank_group"} for name in EACH_STEP.split()},
    **{name: {"sharding", "norms.reduce", "norms.verify", "adapters"} for name in AT_SETUP.split()},
    "all_reduce": {"norms.reduce", "sharding.rank_group", "cli.doctor.ranks"},  # tries one
    "redistribute": {"sharding"},  # a Partial gradient, once, before it is measured
}
# Names that tensors and strings have too: a collective only where they come from torch.distributed.
ALSO_ELSEWHERE = {"broadcast", "reduce", "gather", "scatter", "send", "recv", "barrier"}

# Where torch's private names may stand, and the private names of an adapter's framework.
TORCH_PRIVATE = {"torch_private", "sharding.fsdp1"}
FRAMEWORK_PRIVATE: dict[str, set[str]] = {
    "adapters.accelerate": {"_is_overflow", "_models", "_optimizers"},
    "adapters.deepspeed": {
        *("_config", "_get_sub_group_process_group", "_param_dict", "_wait_for_offload_copies"),
    },
    "adapters.lightning": {"_forward_module"},
    "cli.doctor.apart": {"_exit"},  # of `os`: it is public, in spite of its name
    "adapters.transformers.callback": {"_clip_grad_norm", "_get_grad_norm"},
}


def room_of(module: str) -> str:
    return [*module.split("."), PUBLIC][1]


def lies_in(module: str, places: Collection[str]) -> bool:
    """Whether `module` is one of the places or in one."""
    place = module.removeprefix(f"{PUBLIC}.")
    return any(f"{place}.".startswith(f"{allowed}.") for allowed in places)


def violations(package: Package) -> list[str]:
    found = [*unknown_rooms(package), *cycles(package), *private_names(package)]
    for name, module in package.modules.items():
        whys = ((use.line, complaint(package, name, use)) for use in sorted(module.uses))
        first_lines = {why: line for line, why in reversed([*whys]) if why}
        found += [f"{name}:{line}: {why}" for why, line in first_lines.items()]
    return found


def unknown_rooms(package: Package) -> Iterator[str]:
    for module in package.modules:
        if module != PUBLIC and room_of(module) not in MAY_IMPORT:
            yield f"{module}: the room '{room_of(module)}' is in no table of tests/support/rooms.py"


def cycles(package: Package) -> Iterator[str]:
    if cycle := package.cycle():
        steps = [f"{module}:{package.arrows[module][target]}" for module, target in pairwise(cycle)]
        yield f"a cycle of imports: {' -> '.join(steps)} -> {cycle[-1]}"


def private_names(package: Package) -> Iterator[str]:
    for module, use in package.private_names():
        allowed = TORCH_PRIVATE | {p for p, names in FRAMEWORK_PRIVATE.items() if use.name in names}
        if not lies_in(module, allowed):
            where = ", ".join(sorted(allowed))
            yield f"{module}:{use.line}: names {use.name}, which is private; only {where} may"


def complaint(package: Package, module: str, use: Use) -> str | None:
    """Why `module` may not use that name, or None."""
    first = use.name.partition(".")[0]
    last = use.name.rpartition(".")[2]
    callers = CALLS.get(last)
    if last in ALSO_ELSEWHERE and use.name.startswith("torch.distributed."):
        callers = {"norms.reduce"}
    if callers and not lies_in(module, callers):
        return f"calls {last}; only {', '.join(sorted(callers))} may"
    if first == PUBLIC:
        return forbidden_arrow(package, module, use.name)
    if first == "torch":
        return forbidden_part_of_torch(module, use.name)
    if not first or first in sys.stdlib_module_names or lies_in(module, THIRD_PARTY.get(first, ())):
        return None
    return f"imports {first}, which is neither torch nor the standard library"


def forbidden_part_of_torch(module: str, name: str) -> str | None:
    for part, allowed in TORCH.items():
        if lies_in(name, {part}) and not lies_in(module, allowed):
            return f"names {part}; only {', '.join(sorted(allowed))} may"
    if lies_in(name, {"torch.distributed"}) and lies_in(module, LOCAL):
        return "names torch.distributed, but works on local tensors alone"
    return None


def forbidden_arrow(package: Package, module: str, name: str) -> str | None:
    target, rest = package.owner(name)
    room, other = room_of(module), room_of(target)
    if room in (other, PUBLIC) or other in MAY_IMPORT.get(room, ()):
        return None
    if room == "adapters" and is_public(package, target, rest):
        return None
    allowed = ", ".join(sorted(MAY_IMPORT.get(room, ()))) or "nothing"
    return f"imports {target}; {room} may import {allowed}"


def is_public(package: Package, module: str, name: str) -> bool:
    """Whether `import distclip` offers that name of the module, or the module itself."""
    sources = package.modules[PUBLIC].imports.values()
    offered = {package.owner(source) for source in sources} - {(PUBLIC, "")}
    return (module, "") in offered or (module, name.partition(".")[0]) in offered


def arrows_between_rooms(package: Package) -> set[tuple[str, str]]:
    arrows = [(module, target) for module, used in package.arrows.items() for target in used]
    rooms = {(room_of(module), room_of(target)) for module, target in arrows}
    return {(room, other) for room, other in rooms if room != other and PUBLIC not in (room, other)}


def rooms_of(package: Package) -> set[str]:
    return {room_of(module) for module in package.modules} - {PUBLIC}


def documented(text: str) -> dict[str, set[str]]:
    """The table `| room | is | may import |`: what the last column lists, by the first."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines()]
    rows = [[cell.strip(" `") for cell in line] for line in lines]
    start = rows.index(["room", "is", "may import"]) + 2
    table: dict[str, set[str]] = {}
    for row in rows[start:]:
        if len(row) != 3:
            break
        table[row[0]] = {word.strip(" `") for word in row[2].split(",")} - {"nothing", "—", ""}
    return table
