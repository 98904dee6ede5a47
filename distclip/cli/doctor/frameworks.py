"""The frameworks that have an adapter: installed, tested in this version, and not broken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from distclip.adapters import frameworks as known
from distclip.adapters.deepspeed import attach
from distclip.adapters.frameworks import Framework
from distclip.cli.doctor.apart import Answer, Call, Check
from distclip.cli.doctor.finding import Finding
from distclip.cli.doctor.kernels import LIMIT
from distclip.cli.doctor.ranks import TOLERANCE, loss, norm_in_one_process
from distclip.cli.doctor.versions import is_between
from distclip.policies import ClipNorm

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


def checks(store: str) -> Iterator[Check]:
    """One for each framework that is installed. DeepSpeed makes the file `store`."""
    for framework, modules in MODULES.items():
        if _installed(framework):
            engine = framework is known.DEEPSPEED
            call = Call(try_deepspeed, (store,)) if engine else Call(try_import, (modules,))
            yield Check(framework.name, [call], partial(findings, framework))


def absent() -> Iterator[Finding]:
    for framework in MODULES:
        if not _installed(framework):
            advice = f"to train with it: {_install(framework)}"
            yield Finding(_SECTION, framework.name, "absent", "not installed", advice)


def try_import(modules: list[str]) -> Iterator[str]:
    """Yields nothing; what an import raises is the answer."""
    for module in modules:
        import_module(module)
    yield from ()


def try_deepspeed(store: str) -> Iterator[str]:
    """Clips in the step of an engine of ZeRO 1, in one process; yields how exactly.

    Raises:
        RuntimeError: the norm is wrong.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    deepspeed: Any = import_module(known.DEEPSPEED.name)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    accelerator = deepspeed.accelerator.get_accelerator()
    backend = "gloo" if accelerator.device_name() == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, f"file://{store}", rank=0, world_size=1)
    model, batch = torch.nn.Linear(64, 8), torch.randn(16, 64)
    right = norm_in_one_process(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    handle = attach(engine, ClipNorm(LIMIT))
    engine.backward(loss(engine, batch.to(engine.device)))
    engine.step()
    assert handle.report is not None
    error = abs(handle.report.total_norm.item() / right - 1)
    if not error <= TOLERANCE:  # NaN is wrong too
        raise RuntimeError(f"its engine clips to a norm that is wrong by {error:.0e}")
    yield f"an engine clips to within {error:.0e} of float64"


def findings(framework: Framework, answers: list[Answer]) -> Iterator[Finding]:
    """One, from the answer of `try_import` or `try_deepspeed`."""
    [answer] = answers
    found = _installed(framework)
    finding = Finding(_SECTION, framework.name, "ok", "; ".join([found, *answer.values]))
    if answer.error:
        again = _install(framework).replace("install", "install --force-reinstall", 1)
        advice = f'{again}; python -c "import {MODULES[framework][0]}" shows all of an import error'
        text = f"{found} cannot be used: {answer.error}"
        yield finding._replace(status="unusable", found=text, advice=answer.advice(advice))
    elif is_between(found, framework.lowest, framework.highest):
        yield finding
    else:
        tested = " to ".join(dict.fromkeys([framework.lowest, framework.highest]))
        advice = f"compare its norm with that of one process, or {_install(framework)}"
        text = f"{finding.found}; the adapter is tested with {tested}"
        yield finding._replace(status="warning", found=text, advice=advice)


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
