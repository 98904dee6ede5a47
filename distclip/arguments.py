"""What users pass as numbers, flags and names, as Python's own types."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.errors import LayoutError


def as_number(name: str, value: Any, instead: str = "a number, such as 1.0") -> float:
    """A real number as a float: Python's, numpy's, or the one element of an array or a tensor.

    The element of a tensor on an accelerator is waited for.

    Raises:
        TypeError: anything else, bools and strings such as "1e-3" included.
    """
    if type(value) is float:
        return value
    number = _element(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(
            f"cannot clip with {name}={shown(value)}: it is {kind_of(value)}, which cannot be "
            f"compared with a norm. Pass {instead}."
        )
    try:
        return float(number)
    except OverflowError:  # 10**400
        return math.copysign(math.inf, cast(int, number))


def as_norm_type(name: str, value: Any) -> float:
    """As `as_number`; the string "inf" is infinity, as torch takes it."""
    return math.inf if isinstance(value, str) and value == "inf" else as_number(name, value)


def as_int(what: str, name: str, value: Any) -> int:
    """A whole number.

    Args:
        what: the record that it is a part of, for the error.

    Raises:
        LayoutError: anything else.
    """
    number = _element(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise LayoutError(
        f"cannot make a {what} with {name}={shown(value)}: it is {kind_of(value)}, but elements "
        f"are counted in whole numbers, and others would be taken for those of this rank. Pass an "
        f"int, or ints in a tuple, such as `tuple(tensor.shape)`."
    )


def as_ints(what: str, name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers as a tuple. Raises LayoutError for anything else."""
    each = None if isinstance(value, Set) else items(value)
    if each is not None:
        return tuple(as_int(what, name, number) for number in each)
    raise LayoutError(
        f"cannot make a {what} with {name}={shown(value)}: it is {kind_of(value)}, but it has one "
        f"number for each dim, or for each boundary, in order. Pass a tuple of ints, such as "
        f"`tuple(tensor.shape)`."
    )


def as_flag(name: str, value: Any) -> bool:
    """True or False, also numpy's, or a tensor's.

    Raises:
        TypeError: anything else. A string such as "False" would count as true.
    """
    flag = _element(value)
    if isinstance(flag, bool):
        return flag
    raise TypeError(
        f"cannot use {name}={shown(value)}: it is {kind_of(value)}, and neither yes nor no: "
        f"strings and objects count as true, whatever they say. Pass True or False."
    )


def as_interval(name: str, value: Any) -> int:
    """In which steps something happens: 0 for none (False), 1 for each (True), n for every n-th.

    Raises:
        TypeError: neither a flag nor a number.
        ValueError: a number that is not whole, or below 1.
    """
    flag = _element(value)
    if isinstance(flag, bool):
        return int(flag)
    number = as_number(name, value, "True, False, or n for every n-th step")
    if number >= 1 and number.is_integer():
        return int(number)
    raise ValueError(
        f"cannot make a Clipper with {name}={shown(value)}: steps are counted in whole numbers "
        f"from 1, and no step could be chosen by this one. Pass n for every n-th step, True for "
        f"each, or False for none."
    )


def as_axes(name: str, value: Any) -> tuple[str, ...]:
    """Names of mesh axes as a tuple.

    Raises:
        TypeError: no iterable of strings. A string alone would be read letter by letter.
    """
    axes = items(value)
    if axes is not None and all(isinstance(axis, str) for axis in axes):
        return tuple(axes)
    raise TypeError(
        f"cannot read {name}={shown(value)}: it is {kind_of(value)}, but there may be several such "
        f'mesh axes, each with a name. Pass a tuple of their names, such as ("pp",), or ().'
    )


def as_modules(name: str, value: Any) -> list[nn.Module]:
    """Modules as a list; one stands for itself.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, nn.Module):
        return [value]
    modules = items(value)
    if modules is not None and all(isinstance(module, nn.Module) for module in modules):
        return modules
    raise TypeError(
        f"cannot look for names and layouts in {name}={shown(value)}: it is {kind_of(value)}, and "
        f"only modules have them. Pass the wrapped model that the parameters are from, or several."
    )


def check_mesh_type(mesh: Any) -> None:
    """Raises TypeError unless `mesh` is a DeviceMesh or None."""
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"cannot use mesh={shown(mesh)}: it is {kind_of(mesh)}, which does not say which ranks "
            f"train together. Pass a torch.distributed.device_mesh.DeviceMesh, or None if the "
            f"parameters show it."
        )


def check_function(name: str, value: Any, instead: str) -> None:
    """Raises TypeError unless `value` can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"cannot use {name}={shown(value)}: it is {kind_of(value)} and cannot be called, but "
            f"it is called in each step, or for each parameter. Pass {instead}."
        )


# What groups for an optimizer have beside "params": torch's own, and those of schedulers.
_OPTIMIZER_KEYS = """
    lr initial_lr max_lr min_lr swa_lr weight_decay decoupled_weight_decay betas eps amsgrad
    momentum dampening nesterov base_momentum max_momentum momentum_decay maximize foreach
    capturable differentiable fused alpha centered rho lambd t0 etas step_sizes lr_decay
    initial_accumulator_value initial_accumulator max_iter max_eval tolerance_grad
    tolerance_change history_size line_search_fn beta2_decay d ns_coefficients ns_steps
    adjust_lr_fn param_names"""
_GROUP_KEYS = ("params", "policy", "name")
_LIMIT_KEYS = ("max_norm", "clip_norm", "clip_value", "norm_type", "clip_factor")


def check_group_keys(name: str, group: dict[str, Any]) -> None:
    """Raises ValueError where a key of a group means nothing to distclip, nor to an optimizer.

    A group with "lr" is an optimizer's, and may have any key that does not look like one of ours.
    """
    if "params" not in group:
        raise ValueError(
            f"cannot clip the parameter group {name!r}: it has no 'params', only the keys "
            f"{sorted(map(str, group))}, and nothing would be clipped under it. Pass "
            f"`{{'params': parameters, 'policy': policy, 'name': name}}`."
        )
    for key in group.keys() - {*_GROUP_KEYS, *_OPTIMIZER_KEYS.split()}:
        like = difflib.get_close_matches(str(key).lower(), ("policy",), cutoff=0.7)
        if "lr" not in group or key in _LIMIT_KEYS or like:
            raise ValueError(
                f"cannot clip the parameter group {name!r}: its key {key!r} means nothing here, "
                f"and would be ignored. A group has 'params', and may have a 'policy', such as "
                f"distclip.ClipNorm(0.1), and a 'name'; keys of torch's optimizers are allowed "
                f"beside them. Correct the key, or leave it out."
            )


def items(value: Any) -> list[Any] | None:
    """The items of an iterable; None where there are none: texts, mappings, 0-d arrays."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        return None
    given = cast("Iterable[Any]", value)
    return None if getattr(given, "ndim", 1) == 0 else list(given)


def shown(value: Any) -> str:
    """`repr(value)` on one line, shortened."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_short(names: Sequence[str]) -> str:
    """Names for a message: all of them, or the first six and the last."""
    return ", ".join(names if len(names) <= 8 else [*names[:6], "...", names[-1]])


def _element(value: Any) -> Any:
    """The one element of an array, a numpy scalar or a tensor; else `value` itself."""
    shape = getattr(value, "shape", None)
    if shape is None or not callable(getattr(value, "item", None)) or math.prod(shape) != 1:
        return value
    try:
        return value.item()
    except (RuntimeError, TypeError, ValueError):  # a meta tensor has none
        return value


def kind_of(value: Any) -> str:
    """What `value` is, with an article."""
    if isinstance(value, str):
        from_yaml = " (YAML reads 1e-3 as a string, and 1.0e-3 as a number)"
        return "a str" + (from_yaml if _reads(value) else "")
    name = type(value).__name__
    shape = getattr(value, "shape", None)
    text = f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"
    if isinstance(value, type):
        return f"the class {value.__name__}"  # pyright: ignore[reportUnknownMemberType]
    if shape is None or not hasattr(value, "dtype"):
        return text
    return f"{text} of shape {list(shape)} and {value.dtype}"


def _reads(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
