"""Compiles the Triton kernels that the library launches, for a GPU that need not be here.

    python -m tests.support.compiled LIBRARY TARGET...

runs policies and functions on the device of `accelerator.py`, whose LIBRARY is given, and catches
every launch before it runs; then it compiles these variants, and no copy of their signatures, for
each TARGET ("80", "gfx942"), and prints what it finds in the machine code: a line of JSON each.
Triton must not interpret, so it is a process of its own.
"""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WEAK_TARGET = "89"  # RTX and L4


class Variant(NamedTuple):
    """What Triton compiles once: a kernel with the types of its arguments and its constants.

    Attributes:
        types: by argument; a type, or "constexpr".
        constants: by argument; also what Triton takes as constants: None and the integer 1.
        aligned: the arguments that are multiples of 16.
        options: such as num_warps.
    """

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        rest = [name for name, kind in self.types if kind != "constexpr"]
        specialized = {p.name for p in self.kernel.params if not p.do_not_specialize}
        odd = [name for name in rest if name in specialized and name not in self.aligned]
        return f"{self.kernel.__name__}({constants})" + (f" odd: {odd}" if odd else "")


def of_target(each: Variant, target: str) -> list[Variant]:
    """What is compiled of a variant for that target.

    Only "90" gets most, the others each kernel for one norm and the usual dtypes of gradients.
    Variants for cards whose float64 is weak have a constant that says so: they are compiled for
    "89", and no others.
    """
    constants = dict(each.constants)
    power, weak = constants.get("P", 2.0), target == WEAK_TARGET
    chosen = dict(each.types).get("where", "constexpr") != "constexpr"  # leaves some tensors out
    usual_power = {"finish": 1.0, "finish_norms": 8.0, "partial_norms": 8.0}
    one_norm = power == usual_power.get(each.kernel.__name__, 2.0)
    if (power == 1.0 and not one_norm) or (chosen and power != 2.0):
        return []
    usual = one_norm and not chosen and stored_type(each) in ("", "fp32", "uint16")
    if not (usual and constants.get("OPERATION", 0) in (0, 2)):
        rare = stored_type(each) in ("fp16", "fp64") and (not one_norm or "OUTER" in constants)
        if target != "90" or rare:
            return []
    if "WEAK" not in constants:
        return [] if weak else [each]
    constants["WEAK"] = weak
    return [each._replace(constants=tuple(constants.items()))]


def variant(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> Variant:
    """As Triton's own specialization of arguments."""
    names = [param.name for param in kernel.params]
    given = dict(zip(names, args, strict=False)) | options
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for param in kernel.params:
        value = given.get(param.name, param.default)
        value = getattr(value, "value", value) if not isinstance(value, torch.Tensor) else value
        specialized = not param.do_not_specialize
        if param.is_constexpr or value is None or (_is_int(value) and value == 1 and specialized):
            types[param.name], constants[param.name] = "constexpr", value
            continue
        types[param.name] = param.annotation_type or _type(value)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        by_alignment = specialized and not param.do_not_specialize_on_alignment
        if by_alignment and _is_int(address) and address % 16 == 0:
            aligned.append(param.name)
    others = {name: value for name, value in options.items() if name not in names}
    return Variant(
        kernel,
        tuple(types.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(sorted(others.items())),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


class Caught:
    """Every launch, instead of running it: the variants in order, without repetition.

    Attributes:
        prepared, launched: inside `kernels.prepare`, when a plan is made; and in the calls.
    """

    def __init__(self) -> None:
        self.prepared: dict[Variant, None] = {}
        self.launched: dict[Variant, None] = {}
        self._preparing = 0

    def install(self) -> None:
        from triton.runtime.jit import JITFunction

        from distclip import kernels
        from distclip.kernels import cuda

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            into = self.prepared if self._preparing else self.launched
            into[variant(kernel, args, options)] = None

        JITFunction.run = run
        choose = kernels._choose
        kernels._choose = lambda device: choose(device) if device.type == "cpu" else cuda
        for name in ("prepare", "prepare_units"):
            if hasattr(kernels, name):
                setattr(kernels, name, self._as_preparing(getattr(kernels, name)))

    def _as_preparing(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepared(*args: Any) -> Any:
            self._preparing += 1
            try:
                return prepare(*args)
            finally:
                self._preparing -= 1

        return prepared


def calls(dtype: torch.dtype) -> Iterator[str]:
    """Runs everything that launches kernels for gradients of that dtype; yields what it did.

    The numbers are garbage, since no kernel runs, and no call looks at one.
    """
    import distclip

    module = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3), nn.Conv2d(3, 4, 3))
    module = module.to(dtype).to("toy:0")

    def set_gradients() -> None:
        for param in module.parameters():
            param.grad = None
            param.grad = torch.ones_like(param)

    policies: list[Any] = [distclip.ClipNorm(0.5, p) for p in (2.0, 1.0, 3.0, 8.0, math.inf)]
    policies += [distclip.ClipValue(0.5), distclip.ClipTensorNorm(0.5), distclip.AGC()]
    policies += [distclip.AGC(unit_dim=-1), distclip.ZClip(), distclip.AdaGC()]
    for policy in policies:
        for mode in ("propagate", "zero"):
            set_gradients()
            clipper = distclip.Clipper(module, policy, on_nonfinite=mode)
            clipper.clip_(scale=0.5)
            yield f"{policy} {mode} {dtype}"
    for policy in (distclip.ClipNorm(0.5), distclip.ClipTensorNorm(0.5)):
        clipper = distclip.Clipper(module, policy, overlap=True)
        for param in module.parameters():
            param.grad = None
        loss = sum(param.sum() for param in module.parameters())
        loss.backward()
        clipper.clip_()
        yield f"{policy} overlap {dtype}"
    set_gradients()
    distclip.clip_grad_norm_(module, 0.5)
    distclip.clip_grad_value_(module, 0.5)
    yield f"functions {dtype}"


class Loop(NamedTuple):
    """What one turn of an innermost loop does where all elements of its block are there.

    Attributes:
        loads, stores: of 16 bytes a thread.
        float64: instructions of a thread that compute in float64.
        barriers: waits of a block's threads for each other.
    """

    loads: int
    stores: int
    float64: int
    barriers: int


class Code(NamedTuple):
    """What the machine code of a variant has.

    Attributes:
        spills: bytes of registers that were put into memory.
        loads, stores: of 16 bytes; half_loads, half_stores: of 8.
        atomics: which add in any order.
        loops: those with wide loads or stores.
    """

    spills: int
    loads: int
    stores: int
    half_loads: int
    half_stores: int
    atomics: int
    loops: list[Loop]


def compiled(variants: Sequence[Variant], target: str) -> list[Code]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    is_amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target), 32)
    binaries: list[Any] = []
    for each in variants:
        names = [name for name, _ in each.types]
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in each.aligned}
        source = ASTSource(each.kernel, dict(each.types), dict(each.constants), aligned)
        code = compile(source, target=gpu, options=dict(each.options)).asm
        binaries.append(code["amdgcn"] if is_amd else code["cubin"])
    return [_amd(text) for text in binaries] if is_amd else _nvidia(binaries, target)


def _amd(text: str) -> Code:
    spills = re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
    assert len(spills) == 3, text[-2000:]
    count = text.count
    wide = count("global_load_dwordx4"), count("global_store_dwordx4")
    half = count("global_load_dwordx2"), count("global_store_dwordx2")
    return Code(sum(map(int, spills)), *wide, *half, count("global_atomic"), [])


ARCHITECTURES = {"80": "SM80", "89": "SM89", "90": "SM90a", "100": "SM100a"}  # for nvdisasm


def _nvidia(cubins: list[bytes], target: str) -> list[Code]:
    """One call of nvdisasm for all: each takes 0.3 s before it begins."""
    from triton import knobs

    found: list[Code] = []
    texts = [_machine_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(b"".join(texts))
        options = ["-b", ARCHITECTURES[target], str(file)]
        lines = _with_labels(_output([knobs.nvidia.nvdisasm.path, *options]))
        start = 0
        for cubin, text in zip(cubins, texts, strict=True):
            end = start + len(text)
            sass = "\n".join(line for address, line in lines if start <= address < end)
            assert sass
            start = end
            file.write_bytes(cubin)
            usage = _output([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)])
            spills = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
            assert len(spills) == 2, usage
            wide = _count(sass, WIDE_LOAD), _count(sass, WIDE_STORE)
            half = _count(sass, HALF_LOAD), _count(sass, HALF_STORE)
            atomics = _count(sass, ATOMIC)
            found.append(Code(sum(map(int, spills)), *wide, *half, atomics, list(_loops(sass))))
    return found


def _machine_code(cubin: bytes) -> bytes:
    """The one section of instructions of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    names = cubin[sections[index][4] :]
    (code,) = (s for s in sections if names[s[0] :].startswith(b".text."))
    return cubin[code[4] : code[4] + code[5]]


def _with_labels(sass: str) -> list[tuple[int, str]]:
    """The instructions with their addresses, and a label before each to which one jumps."""
    jump = re.compile(r"(\b(?:BRA|BSSY|CALL|WARPSYNC)\b.*)\b0x([0-9a-f]+) ;")
    labels = {int(target, 16) for _, target in jump.findall(sass)}
    lines: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if not (address := re.match(r"\s+/\*([0-9a-f]{4,})\*/", line)):
            continue
        at = int(address[1], 16)
        if at in labels:
            lines.append((at, f".L_x_{at}:"))
        lines.append((at, jump.sub(lambda found: f"{found[1]}`(.L_x_{int(found[2], 16)}) ;", line)))
    return lines


WIDE_LOAD, WIDE_STORE = r"\bLDG\.E\.(?:\w+\.)*128\b", r"\bSTG\.E\.(?:\w+\.)*128\b"
HALF_LOAD, HALF_STORE = r"\bLDG\.E\.(?:\w+\.)*64\b", r"\bSTG\.E\.(?:\w+\.)*64\b"
FLOAT64, BARRIER = r"\bD(?:ADD|MUL|FMA|MNMX|SETP)\b", r"\bBAR\."
ATOMIC = r"\b(?:ATOM|ATOMG|RED|REDG)\b"


def _count(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))


def _loops(sass: str) -> Iterator[Loop]:
    """Innermost loops: from a label to the jump back, without the blocks that load with a mask."""
    lines = sass.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    spans: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        if (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and labels[jump[1]] < i:
            spans.append((labels[jump[1]], i))
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        blocks = re.split(
            r"^\.L_x_\d+:$|\bBRA\b.*$", "\n".join(lines[first : last + 1]), flags=re.M
        )
        whole = "\n".join(block for block in blocks if not _is_masked(block))
        loads, stores = _count(whole, WIDE_LOAD), _count(whole, WIDE_STORE)
        if loads or stores:
            yield Loop(loads, stores, _count(whole, FLOAT64), _count(whole, BARRIER))


def _is_masked(block: str) -> bool:
    """Whether it loads elements one by one; addresses and operands are loaded before a loop."""
    return bool(re.search(r"@!?U?P\d+\s+(?:LDG|STG)\.(?![\w.]*128)", block))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stored_type(each: Variant) -> str:
    """The dtype of the elements, where the variant is for one: a constant of it is a type."""
    from triton import language as tl

    return next((str(value) for _, value in each.constants if isinstance(value, tl.dtype)), "")


def main(library: str, targets: list[str]) -> None:
    from tests.support import accelerator

    accelerator.install(library)
    caught = Caught()
    caught.install()
    for dtype in DTYPES:
        for _ in calls(dtype):
            pass
    late = [each.name for each in caught.launched if each not in caught.prepared]
    print(json.dumps({"late": late}))
    for target in targets:
        each_kind = dict.fromkeys([*caught.prepared, *caught.launched])
        variants = [on_card for each in each_kind for on_card in of_target(each, target)]
        for each, code in zip(variants, compiled(variants, target), strict=True):
            found = code._asdict() | {"loops": [loop._asdict() for loop in code.loops]}
            about = {"target": target, "name": each.name, "dtype": stored_type(each)}
            constants = {k: repr(v) for k, v in each.constants}
            kernel = each.kernel.__name__
            print(json.dumps({**about, "kernel": kernel, "constants": constants, **found}))
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
