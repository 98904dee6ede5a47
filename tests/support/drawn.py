"""Hypothesis; where it is not installed, its tests are skipped and the others of a file run."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import given, settings, strategies
except ImportError:

    def given(*drawn: Any, **named: Any) -> Any:
        def skipped(test: Any) -> Any:
            @pytest.mark.skip(reason="hypothesis is not installed")
            def without_arguments() -> None: ...

            without_arguments.__name__ = test.__name__
            return without_arguments

        return skipped

    def settings(**options: Any) -> Any:
        return lambda test: test

    class _Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda *given, **named: self

    strategies: Any = _Anything()  # type: ignore[no-redef]

__all__ = ["given", "settings", "strategies"]
