"""What distclip raises beside `ValueError`."""


class LayoutError(ValueError):
    """It is unknown which ranks hold a parameter, or the ranks contradict each other."""


class NonFiniteGradientError(RuntimeError):
    """The total norm is not finite. Every rank of the step raises it, or none."""


class SkippedStepsError(RuntimeError):
    """Too many steps in a row were left out, the last one by a policy that found a spike."""
