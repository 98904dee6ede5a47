"""What distclip raises beside `ValueError`."""


class LayoutError(ValueError):
    """The ranks that hold a parameter cannot be told, or contradict each other."""


class NonFiniteGradientError(RuntimeError):
    """The total norm is not finite. Raised on every rank of the step or on none, with the same message."""
