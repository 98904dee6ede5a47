"""What every adapter checks first."""

from __future__ import annotations

import gc
import sys
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from distclip.adapters.frameworks import Framework, claim, import_framework, release

THIS = Framework("some-trainer", "1.2.0", "1.4.9", options="--option ")


def a_trainer(version: str | None) -> types.ModuleType:
    module = types.ModuleType("some_trainer")
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    return module


def test_a_missing_framework_is_an_import_error_that_says_how_to_install_it() -> None:
    with pytest.raises(
        ImportError,
        match=r"some-trainer: it is not installed.*`pip install --option some-trainer==1\.4\.9`",
    ):
        import_framework(THIS, "some_trainer.engine")


def test_what_a_framework_itself_lacks_is_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "some_trainer.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_missing"):
        import_framework(THIS, "some_trainer")


@pytest.mark.parametrize("version", ["1.2.0", "1.3", "1.4.9", "1.4.9+cpu"])
def test_tested_versions_say_nothing(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "some_trainer", a_trainer(version))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_framework(THIS, "some_trainer")


@pytest.mark.parametrize("version", ["1.1.9", "1.5.0", "2.0.dev0", None])
def test_other_versions_are_warned_of(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setitem(sys.modules, "some_trainer", a_trainer(version))
    with pytest.warns(UserWarning, match=r"tested with some-trainer 1\.2\.0 to 1\.4\.9"):
        import_framework(THIS, "some_trainer")


def test_a_claim_is_for_one_owner_until_it_is_released() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    claim(optimizer, "a")
    with pytest.raises(ValueError, match=r"this SGD with b: a does already"):
        claim(optimizer, "b")
    with pytest.raises(ValueError, match=r"this SGD again: a does already"):
        claim(optimizer, "a")
    release(optimizer)
    release(optimizer)
    claim(optimizer, "b")


def test_a_claim_keeps_nothing_alive() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    claim(optimizer, "a")
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None
