"""What each rank says beside its sums, in the same all-reduce: do the ranks mean the same call?

Where they do not, sums of different things are added, and every rank has a wrong norm. A rank puts
a *header* in front of its partials: the *tag* t of its call and that of its gradients which are yet
to be reduced, each as t and t**2 where sums are taken, and as t and -t where maxima are; then two
flags. Sums of n t and n t**2 fit only where all tags are equal: the mean of the squares is the
square of the mean. For maxima, the largest and the smallest tag are equal.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from enum import Enum
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADER_SIZE = 6
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

    def encode(self, is_max: bool, device: torch.device) -> Tensor:
        """Shapes: the result: [HEADER_SIZE]; float64."""
        numbers = [*_pair(self.text, is_max), *_pair(self.unreduced, is_max)]
        numbers += [self.missing, self.fault]
        return torch.tensor(numbers, dtype=torch.float64, device=device)


class Answer(NamedTuple):
    """What all ranks said, the same on each; on the device.

    Attributes:
        agrees: all mean the same call; a bool scalar.
        alike: all have the same gradients to reduce, or none; a bool scalar.
        flags: whether some rank has such gradients, lacks one, has found an error; bool [3].
    """

    agrees: Tensor
    alike: Tensor
    flags: Tensor

    @property
    def is_wrong(self) -> Tensor:
        """Whether sums do not belong together, lack a gradient's values, or a rank has an error.

        That a rank has no gradient is no error by itself.
        """
        return ~self.agrees | self.flags[0] | self.flags[2]


def decode(reduced: Tensor, mine: Header, is_max: bool, num_ranks: int) -> Answer:
    """Shapes: reduced: [HEADER_SIZE], combined over the ranks."""
    n = 1 if is_max else num_ranks
    call, unreduced = _pair(mine.text, is_max), _pair(mine.unreduced, is_max)
    agrees = (reduced[0] == n * call[0]) & (reduced[1] == n * call[1])
    alike = (reduced[2] == n * unreduced[0]) & (reduced[3] == n * unreduced[1])
    return Answer(agrees, alike, torch.cat([reduced[2:3], reduced[4:6]]) > 0)


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
