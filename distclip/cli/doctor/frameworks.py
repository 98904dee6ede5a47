"""The frameworks that have an adapter: installed, tested in this version, and not broken."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from distclip.adapters import frameworks as known
from distclip.adapters.frameworks import Framework
from distclip.cli.doctor.apart import Answer, Call, Check
from distclip.cli.doctor.finding import Finding
from distclip.cli.doctor.versions import is_between

# What shows that an adapter can be used: its module, where that imports the framework at once.
MODULES = {
    known.TRANSFORMERS: ["distclip.adapters.transformers"],
    known.ACCELERATE: ["distclip.adapters.accelerate"],
    known.LIGHTNING: ["distclip.adapters.lightning"],
    known.TORCHTITAN: ["distclip.adapters.torchtitan"],
    known.MEGATRON: ["megatron.core", "megatron.core.optimizer"],
    known.DEEPSPEED: ["deepspeed"],
}
_SECTION = "frameworks"


def checks() -> Iterator[Check]:
    """One for each framework that is installed."""
    for framework, modules in MODULES.items():
        if _installed(framework):
            call = Call(try_import, (modules,))
            yield Check(framework.name, [call], partial(findings, framework))


def absent() -> Iterator[Finding]:
    for framework in MODULES:
        if not _installed(framework):
            advice = f"to train with it: {_install(framework)}"
            yield Finding(_SECTION, framework.name, "absent", "not installed", advice)


def try_import(modules: list[str]) -> Iterator[str]:
    """Yields the names of the modules that could be imported."""
    for module in modules:
        import_module(module)
        yield module


def findings(framework: Framework, answers: list[Answer]) -> Iterator[Finding]:
    """One, from the answer of `try_import`."""
    [answer] = answers
    yield _finding(framework, _installed(framework), answer.error)


def _finding(framework: Framework, found: str, error: str) -> Finding:
    if error:
        again = _install(framework).replace("install", "install --force-reinstall", 1)
        advice = f'{again}; python -c "import {MODULES[framework][0]}" shows all of the error'
        text = f"{found} cannot be imported: {error}"
        return Finding(_SECTION, framework.name, "unusable", text, advice)
    if is_between(found, framework.lowest, framework.highest):
        return Finding(_SECTION, framework.name, "ok", found)
    tested = " to ".join(dict.fromkeys([framework.lowest, framework.highest]))
    advice = f"compare its norm with that of one process, or {_install(framework)}"
    text = f"{found}; the adapter is tested with {tested}"
    return Finding(_SECTION, framework.name, "warning", text, advice)


def _install(framework: Framework) -> str:
    return f"pip install {framework.options}{framework.name}=={framework.highest}"


def _installed(framework: Framework) -> str:
    """The version; "" where pip has not installed it. It is not imported."""
    names = [framework.name]
    if framework is known.LIGHTNING:
        names.append("pytorch-lightning")  # the same under its earlier name
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
