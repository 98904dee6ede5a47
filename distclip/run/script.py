"""A script, or a module, that is run as `python` runs it, with distclip's functions."""

from __future__ import annotations

import atexit
import json
import os
import sys
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from distclip.adapters.pytorch import ReplacedTorch, replacing_torch

_ENV = "DISTCLIP_RUN"  # tells processes that the script starts what to import as their main module
_AGAIN = "distclip.run.again"


class _Script(NamedTuple):
    code: CodeType
    file: str
    package: str | None


class _Spec(ModuleSpec):
    """What processes are to import as their main module, and the package of the script."""

    def __init__(self, package: str | None) -> None:
        super().__init__(_AGAIN, None)
        self._package = package

    @property
    def parent(self) -> str:
        return self._package or ""  # none: relative imports of a script fail, as under python


def run_command(usage: str | None) -> None:
    """Runs what the command line names."""
    argv = sys.argv[1:]
    is_module = argv[:1] == ["-m"]
    target, arguments = argv[is_module : is_module + 1], argv[is_module + 1 :]
    if not target or target[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if target else 2)
    _run_as_main(is_module, target[0], arguments)


def run_again() -> None:
    """Runs the script of the process that has started this one, with the arguments given here.

    Raises:
        SystemExit: no script has started it.
    """
    if _ENV not in os.environ:
        raise SystemExit(
            f"cannot run {_AGAIN}: it is for processes that a script starts. Run "
            f"`python -m distclip.run script.py`."
        )
    is_module, target = json.loads(os.environ[_ENV])
    _run_as_main(is_module, target, sys.argv[1:])


def run_in_spawned_process(namespace: dict[str, Any]) -> None:
    """Makes the functions and classes of the script, as `multiprocessing` does in a new process."""
    is_module, target = json.loads(os.environ[_ENV])
    _replace_torch_until_exit()
    _run(_load(is_module, target), namespace, "__mp_main__")


def _run_as_main(is_module: bool, target: str, arguments: list[str]) -> None:
    if not is_module and not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        sys.path[0] = str(Path(target).resolve().parent)
    script = _load(is_module, target)
    sys.argv = [script.file if is_module else target, *arguments]
    os.environ[_ENV] = json.dumps([is_module, target if is_module else script.file])
    module = ModuleType("__main__")
    # What a spawned process sends back is of classes in `__mp_main__`: `multiprocessing` has the
    # main module under that name too, and has been imported.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    replaced = _replace_torch_until_exit()
    try:
        _run(script, vars(module), "__main__")
    except SystemExit as end:
        if not end.code:
            _say_if_idle(target, replaced)
        raise
    _say_if_idle(target, replaced)


def _replace_torch_until_exit() -> ReplacedTorch:
    """Threads of the script may go on when its last line has run."""
    stack = ExitStack()
    atexit.register(stack.close)  # which also keeps it
    return stack.enter_context(replacing_torch())


def _say_if_idle(target: str, replaced: ReplacedTorch) -> None:
    if not replaced.num_calls and os.environ.get("RANK", "0") == "0":
        print(
            f"distclip.run: {target} has called none of torch's clipping functions in this "
            f"process, and nothing was replaced. DeepSpeed, Megatron-core and Lightning under FSDP "
            f"have functions of their own: see distclip.adapters.",
            file=sys.stderr,
        )


def _load(is_module: bool, name: str) -> _Script:
    if is_module:
        return _load_module(name)
    path = Path(name)
    if not path.is_file():
        raise SystemExit(f"cannot run {name}: there is no such file, or it is a folder.")
    file = os.path.abspath(name)  # as python has it: the script may go to another folder
    # Without the `from __future__` of this file.
    return _Script(compile(path.read_bytes(), file, "exec", dont_inherit=True), file, None)


def _load_module(name: str) -> _Script:
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that a package of it needs
        spec = None
    loader: Any = None if spec is None else spec.loader
    code = None if spec is None or loader is None else loader.get_code(spec.name)
    if spec is None or code is None:
        raise SystemExit(
            f"cannot run -m {name}: there is no such module, or none to be run. Pass the name of "
            f"a module, such as package.train, or leave out -m for a file."
        )
    return _Script(code, str(spec.origin), spec.parent)


def _run(script: _Script, namespace: dict[str, Any], name: str) -> None:
    namespace.update(__name__=name, __file__=script.file, __package__=script.package)
    namespace["__spec__"] = _Spec(script.package)
    exec(script.code, namespace)  # noqa: S102  (the user's script, as `python` runs it)
