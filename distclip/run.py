"""`python -m distclip.run script.py ...`: a script whose torch functions are distclip's.

    python -m distclip.run script.py --its --own arguments
    python -m distclip.run -m package.module --its --own arguments
    torchrun --nproc-per-node 2 -m distclip.run script.py

It runs the script as `python` would, inside `distclip.adapters.replacing_torch()`. Processes that
the script starts by `multiprocessing` or `torch.multiprocessing.spawn` have distclip's functions as
well. A new `python`, such as a rank of torchrun, has not: put `-m distclip.run` there.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from distclip.adapters.pytorch import replacing_torch

_ENV = "DISTCLIP_RUN"  # tells processes that the script starts what to import as their main module


class _Script(NamedTuple):
    code: CodeType
    file: str
    package: str | None


def main() -> None:
    argv = sys.argv[1:]
    is_module = argv[:1] == ["-m"]
    target, arguments = argv[is_module : is_module + 1], argv[is_module + 1 :]
    if not target or target[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if target else 2)
    if not is_module:
        sys.path[0] = str(Path(target[0]).resolve().parent)
    script = _load(is_module, target[0])
    sys.argv = [script.file if is_module else target[0], *arguments]
    os.environ[_ENV] = json.dumps([is_module, os.path.abspath(target[0]), target[0]])
    module = ModuleType("__main__")
    # A spawned process imports what the spec of `__main__` names, as `__mp_main__`: this file.
    module.__spec__ = find_spec("distclip.run")
    sys.modules["__main__"] = module
    with replacing_torch() as replaced:
        _run(script, vars(module), "__main__")
    if not replaced.num_calls and os.environ.get("RANK", "0") == "0":
        print(
            f"distclip.run: {target[0]} has called none of torch's clipping functions in this "
            f"process, and nothing was replaced. DeepSpeed, Megatron-core and Lightning under FSDP "
            f"have functions of their own: see distclip.adapters.",
            file=sys.stderr,
        )


def _load(is_module: bool, name: str) -> _Script:
    if not is_module:
        path = Path(name)
        if not path.is_file():
            raise SystemExit(f"cannot run {name}: there is no such file, or it is a folder.")
        return _Script(compile(path.read_bytes(), name, "exec"), name, None)
    spec = find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{name}.__main__")
    loader: Any = None if spec is None else spec.loader
    code = None if spec is None or loader is None else loader.get_code(spec.name)
    if spec is None or code is None:
        raise SystemExit(f"cannot run -m {name}: there is no such module, or none to be run.")
    return _Script(code, str(spec.origin), spec.parent)


def _run(script: _Script, namespace: dict[str, Any], name: str) -> None:
    namespace.update(__name__=name, __file__=script.file, __package__=script.package)
    exec(script.code, namespace)


def _run_in_spawned_process() -> None:
    is_module, path, name = json.loads(os.environ[_ENV])
    stack = ExitStack()
    stack.enter_context(replacing_torch())
    atexit.register(stack.close)  # which also keeps it
    _run(_load(is_module, name if is_module else path), globals(), __name__)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    _run_in_spawned_process()
