"""What distclip raises beside `ValueError`."""

from __future__ import annotations

from collections.abc import Sequence


class LayoutError(ValueError):
    """It is unknown which ranks hold a parameter, or the ranks contradict each other."""


class NonFiniteGradientError(RuntimeError):
    """The total norm is not finite. Every rank of the step raises it, or none."""


class SkippedStepsError(RuntimeError):
    """Too many steps in a row were left out, the last one by a policy that found a spike."""


class CollectiveError(RuntimeError):
    """A collective has failed; torch's own error is the `__cause__`.

    Attributes:
        ranks: those that took no part in it; empty where that is not known.
    """

    def __init__(self, text: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(text, ranks)
        self.ranks = [*ranks]

    def __str__(self) -> str:
        return str(self.args[0])
