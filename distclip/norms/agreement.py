"""What each rank says beside its sums, in the same all-reduce: do the ranks mean the same call?

Where they do not, sums of different things are added, and every rank has a wrong norm. A rank puts
a *header* in front of its partials: the *tag* t of its call and that of its gradients which are yet
to be reduced, each as t and t**2 where sums are taken, and as t and -t where maxima are; then two
flags. Sums of n t and n t**2 fit only where all tags are equal: the mean of the squares is the
square of the mean. For maxima, the largest and the smallest tag are equal.

On an accelerator nobody looks at the header in the same step. It is compared there with what it
should be, and comes to the host some steps later.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.kernels.upload import upload
from distclip.torch_private import has_values, is_capturing

HEADER_SIZE = 6
_NUM_JUDGED = 5  # without the last one: that a rank has no gradient is no error by itself
# Messages are filled up to a multiple of this. gloo waits for ever where the ranks send different
# sizes; with one size for the usual calls, it is the tags that differ.
_MULTIPLE = 8
_TAGS = 1 << 19  # n t**2 is exact in float64 for up to 2**14 ranks


class Header(NamedTuple):
    """What this rank says.

    Attributes:
        text: the call: policies, rules, groups, the user's step.
        unreduced: the gradients that a collective has yet to reduce; empty where there are none.
        missing: it has no gradient for a parameter that other ranks may have an unreduced one of.
        fault: it has found an error that others cannot see.
    """

    text: str
    unreduced: str = ""
    missing: bool = False
    fault: bool = False

    def numbers(self, is_max: bool) -> list[float]:
        """The header as it is sent; HEADER_SIZE numbers."""
        tags = *_pair(self.text, is_max), *_pair(self.unreduced, is_max)
        return [*map(float, tags), float(self.fault), float(self.missing)]


class Encoded(NamedTuple):
    """What a rank sends around its payload, and what the header must become; on the device.

    Shapes: header: [HEADER_SIZE]; filling: [num_filling]; expected: [_NUM_JUDGED]; float64.
    """

    header: Tensor
    filling: Tensor
    expected: Tensor

    def is_wrong(self, reduced: Tensor) -> Tensor:
        """As `Answer.is_wrong` of the combined header, which lies on an accelerator."""
        return (reduced[:_NUM_JUDGED] != self.expected).any()


def encode(header: Header, is_max: bool, num_ranks: int, num_filling: int, like: Tensor) -> Encoded:
    """A header on the device of `like`, without a wait for it.

    The latest ones are kept there. They belong to a stream: on another one, they might be used
    before they have arrived. A CUDA graph gets its own, which it reads at each replay.
    """
    call = header, is_max, num_ranks, num_filling
    if not has_values(like):
        numbers = torch.tensor(_numbers(*call), dtype=torch.float64, device=like.device)
        return _split(numbers, num_filling)
    if is_capturing(like.device):
        return _upload(*call, like.device)
    return _kept(*call, like.device, _stream(like.device))


def _upload(
    header: Header, is_max: bool, num_ranks: int, num_filling: int, device: torch.device
) -> Encoded:
    numbers = _numbers(header, is_max, num_ranks, num_filling)
    with torch.inference_mode(False):  # used outside of inference mode too
        host = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return _split(upload(host, device), num_filling)


@lru_cache(maxsize=32)  # with the user's `step=` every step has another header
def _kept(
    header: Header, is_max: bool, num_ranks: int, num_filling: int, device: torch.device, _: Any
) -> Encoded:
    return _upload(header, is_max, num_ranks, num_filling, device)


def _numbers(header: Header, is_max: bool, num_ranks: int, num_filling: int) -> list[float]:
    n = 1 if is_max else num_ranks
    expected = [float(n * number) for number in _pair(header.text, is_max)]
    nothing = [0.0] * (_NUM_JUDGED - len(expected))
    return [*header.numbers(is_max), *[0.0] * num_filling, *expected, *nothing]


def _split(numbers: Tensor, num_filling: int) -> Encoded:
    return Encoded(*torch.split(numbers, [HEADER_SIZE, num_filling, _NUM_JUDGED]))


def _stream(device: torch.device) -> Any:
    if device.type == "cpu":
        return None
    device_module: Any = torch.get_device_module(device.type)
    has_streams = hasattr(device_module, "current_stream")
    return device_module.current_stream(device) if has_streams else None


class Answer(NamedTuple):
    """What all ranks said, the same on each.

    Attributes:
        agrees: all mean the same call.
        alike: all have the same gradients to reduce, or none.
        unreduced: some rank has such gradients.
        missing: some rank lacks one.
        fault: some rank has found an error.
    """

    agrees: bool
    alike: bool
    unreduced: bool
    missing: bool
    fault: bool

    @property
    def is_wrong(self) -> bool:
        """Whether sums do not belong together, lack a gradient's values, or a rank has an error."""
        return not self.agrees or self.unreduced or self.fault


def decode(reduced: Sequence[float], mine: Header, is_max: bool, num_ranks: int) -> Answer:
    """reduced: HEADER_SIZE numbers, combined over the ranks."""
    n = 1 if is_max else num_ranks
    call = [n * number for number in _pair(mine.text, is_max)]
    unreduced = [n * number for number in _pair(mine.unreduced, is_max)]
    tags, reduced_tags, (fault, missing) = [*reduced[:2]], [*reduced[2:4]], reduced[4:]
    return Answer(
        tags == call, reduced_tags == unreduced, reduced_tags[0] > 0, missing > 0, fault > 0
    )


def _pair(text: str, is_max: bool) -> tuple[int, int]:
    """The two numbers of a text's tag, which is 0 for no text."""
    tag = 1 + zlib.crc32(text.encode()) % _TAGS if text else 0
    return tag, -tag if is_max else tag**2


def message_size(payload_sizes: Sequence[int]) -> int:
    """How many numbers a rank sends: a header, the payloads of all groups, and zeros."""
    return -(-(HEADER_SIZE + sum(payload_sizes)) // _MULTIPLE) * _MULTIPLE


def policy_text(policy: Any) -> str:
    """A policy's class and the numbers and names in it: the same text on ranks that agree.

    `repr` would not do: that of an object may hold an address, and that of a module its shards.
    """
    fields: list[str] = []
    if dataclasses.is_dataclass(policy):
        for field in dataclasses.fields(policy):
            if (text := _value_text(getattr(policy, field.name))) is not None:
                fields.append(f"{field.name}={text}")
    return f"{type(policy).__name__}({', '.join(fields)})"


def _value_text(value: Any) -> str | None:
    """None for what may differ between ranks that agree."""
    if isinstance(value, bool | str | Enum) or value is None:
        return str(value)
    if isinstance(value, Real):
        return repr(float(value))
    if dataclasses.is_dataclass(value):
        return policy_text(value)
    return None
