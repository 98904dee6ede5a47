"""What distclip raises beside `ValueError`."""


class LayoutError(ValueError):
    """It is unknown which ranks hold a parameter, or the ranks contradict each other."""


class NonFiniteGradientError(RuntimeError):
    """The total norm is not finite. Every rank of the step raises it, or none."""
