"""What the command line says: every option, every policy, and each wrong one as a single line."""

import contextlib
import dataclasses
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tyro
from ranks import UserError

import distclip

PolicyT = TypeVar("PolicyT")

# --policy NAME starts from these settings; the fields of the dataclass become --policy.FIELD. One line adds a policy.
POLICIES: dict[str, Any] = {
    "clip-norm": distclip.ClipNorm(1.0),
    "tensor-norm": distclip.ClipTensorNorm(0.1),
    "block-rms": distclip.ClipBlockRMS(1e-3),
    "value": distclip.ClipValue(1e-3),
    "agc": distclip.AGC(0.01),
    "autoclip": distclip.AutoClip(),
    "zclip": distclip.ZClip(),
    "adagc": distclip.AdaGC(),
    "none": distclip.ClipNorm(math.inf),  # measures, never writes a gradient
}

MIN_RANKS = {"ddp": 1, "fsdp1": 1, "fsdp2": 1, "hsdp": 4, "tp": 2, "fsdp2+tp": 4, "zero1": 1, "zero2": 1, "zero3": 1}
DEFAULT_WIDTHS = {"gpt": 192, "lstm": 256}
DEFAULT_DEPTHS = {"gpt": 3, "lstm": 2}
HEADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Generic[PolicyT]):
    """One training run."""

    policy: PolicyT
    """Settings of the policy that --policy names."""
    policy_name: tyro.conf.Suppress[str] = "clip-norm"
    """The name given to --policy; kept for the report."""
    model: Literal["gpt", "lstm"] = "gpt"
    """Byte-level GPT of about 1.5M parameters, or an LSTM of about 1.2M."""
    layout: Literal["ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2+tp", "zero1", "zero2", "zero3"] = "ddp"
    """How the ranks share the model. tp needs 2 ranks, hsdp and fsdp2+tp need 4; zero1 to zero3 need DeepSpeed."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the forward pass computes in; parameters and gradients stay in float32, except under ZeRO."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain SGD as the LSTM papers on exploding gradients use."""
    steps: int = 300
    """Where training ends, counted from the very first step (also with --resume)."""
    batch: int = 16
    """Sequences a step, shared out over the data-parallel ranks: the same training on any number of ranks."""
    context: int = 64
    """Bytes a sequence."""
    lr: float = 2e-3
    """Peak learning rate, after the warm-up; a cosine leads it down to a tenth."""
    warmup: int = 20
    """Steps in which the learning rate rises from nothing to --lr."""
    width: int | None = None
    """Width of the model; 192 for gpt, 256 for lstm."""
    depth: int | None = None
    """Layers of the model; 3 for gpt, 2 for lstm."""
    data: Path | None = None
    """Folder of text files to learn; without it, the source files of Python's standard library."""
    out: Path = Path("runs/main")
    """Folder for metrics.jsonl, report.png and checkpoints/. Without --resume an earlier run in it is replaced."""
    resume: bool = False
    """Go on from the last complete checkpoint in --out; from the start where there is none. Also done without it when
    torchrun or SLURM starts a run again."""
    save_every: int = 50
    """Steps between checkpoints, of which the last two are kept; with 0, one only when asked to stop."""
    seed: int = 0
    """Seed of the first weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs where there is one for each rank of the machine, else the CPU."""
    timeout: float = 120.0
    """Seconds a rank waits for the others before it gives up, as when a machine or a cable is lost."""

    @property
    def shape(self) -> dict[str, Any]:
        """What decides the parameters' names and sizes: width and depth with their defaults filled in."""
        width, depth = self.width or DEFAULT_WIDTHS[self.model], self.depth or DEFAULT_DEPTHS[self.model]
        return {"model": self.model, "width": width, "depth": depth}


def read_options(args: Sequence[str]) -> Options[Any]:
    """The options in `args`, checked as far as they can be without the other ranks."""
    name, rest = _policy_name(args)
    preset = POLICIES[name]
    options = _parse(type(preset), Options(policy=preset, policy_name=name), rest)
    _check_numbers(options)
    _check_ranks(options)
    return options


def _policy_name(args: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --policy and all other arguments: tyro then sees one concrete dataclass, so that its fields
    are flags anywhere on the line and not behind a subcommand."""
    name, rest, words = "clip-norm", [], iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--local_rank":  # from the deepspeed launcher, which says it in the environment as well
            continue
        if flag == "--policy":
            name = value if equals else next(words, "")
        else:
            rest.append(word)
    if name not in POLICIES:
        raise UserError(f"--policy {name or '(nothing)'}: there are {', '.join(POLICIES)}")
    return name, rest


def _parse(policy: type, default: Options[Any], args: list[str]) -> Options[Any]:
    """tyro's reading of `args`; its box of an error becomes one line."""
    description = f"Trains a small model under distclip.\n--policy NAME takes one of: {', '.join(POLICIES)}."
    said = io.StringIO()
    on_rank_0 = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Options[policy],
                prog="train.py",
                description=description,
                default=default,
                args=args,
                console_outputs=on_rank_0,
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """The first paragraph inside one of tyro's boxes."""
    inside = [line.strip("│ ") for line in box.splitlines()[1:]]
    ends = (n for n, line in enumerate(inside) if not line.strip("─╰╯"))
    text = " ".join(inside[: next(ends, None)])
    return text.replace(" .", ".") or "the options cannot be read (--help lists them)"


def _check_numbers(options: Options[Any]) -> None:
    width, depth = options.shape["width"], options.shape["depth"]
    for name in ("steps", "batch", "context"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    for name in ("save_every", "warmup"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: 0 or more")
    for name in ("lr", "timeout"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} {getattr(options, name)}: a finite number above 0")
    if width < 1 or depth < 1:
        raise UserError(f"--width {width} --depth {depth}: both at least 1")
    if options.model == "lstm" and options.precision == "fp16" and "tp" in options.layout:
        raise UserError("--model lstm --layout tp: torch's GradScaler refuses DTensors beside plain tensors; use bf16")
    if options.model == "gpt" and width % (2 * HEADS):
        raise UserError(f"--width {width}: a gpt of {HEADS} heads needs a multiple of {2 * HEADS}")


def _check_ranks(options: Options[Any]) -> None:
    """Read from torchrun's environment, so that the line comes before anyone waits for a process group."""
    num_ranks, needed = int(os.environ.get("WORLD_SIZE", "1")), MIN_RANKS[options.layout]
    if num_ranks < needed:
        start = f"torchrun --standalone --nproc-per-node={needed} {sys.argv[0]} ..."
        if "SLURM_JOB_ID" in os.environ:
            start = "raise --nodes, --ntasks-per-node (srun) or NPROC_PER_NODE (torchrun)"
        raise UserError(f"--layout {options.layout} needs {needed} ranks or more and there are {num_ranks}: {start}")
    if needed == MIN_RANKS["hsdp"] and num_ranks % 2:
        raise UserError(f"--layout {options.layout} pairs the ranks up and there are {num_ranks}: use an even number")
    if options.layout == "tp" and (HEADS % num_ranks or options.context % num_ranks):
        raise UserError(
            f"--layout tp splits {HEADS} heads and {options.context} positions evenly and there are "
            f"{num_ranks} ranks: use {HEADS} or fewer, and a --context they divide"
        )
    num_data_ranks = {"tp": 1, "fsdp2+tp": num_ranks // 2}.get(options.layout, num_ranks)
    if options.batch % num_data_ranks:
        raise UserError(f"--batch {options.batch} cannot be shared out evenly over {num_data_ranks} data ranks")
