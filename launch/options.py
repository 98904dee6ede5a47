"""The command line of `launch.train`: its options, and one line for each mistake in them."""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tyro

import distclip
from launch.files import one_line
from launch.ranks import UserError
from launch.task import HEADS

PolicyT = TypeVar("PolicyT")

# --policy NAME starts from these settings, and each field of the dataclass is a --policy.FIELD.
# A new policy is one more line.
POLICIES: dict[str, Any] = {
    "clip-norm": distclip.ClipNorm(1.0),
    "tensor-norm": distclip.ClipTensorNorm(0.1),
    "block-rms": distclip.ClipBlockRMS(1e-3),
    "value": distclip.ClipValue(1e-3),
    "agc": distclip.AGC(0.01),
    "autoclip": distclip.AutoClip(),
    "zclip": distclip.ZClip(),
    "skip-spike": distclip.SkipSpike(),
    "adagc": distclip.AdaGC(),
    "adagn": distclip.AdaGN(),
    "aggc": distclip.AGGC(),
    "none": distclip.ClipNorm(math.inf),  # measures, never writes a gradient
}

Layout = Literal["ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2+tp", "zero1", "zero2", "zero3"]
MIN_RANKS = {"tp": 2, "hsdp": 4, "fsdp2+tp": 4}
DEFAULT_WIDTHS = {"gpt": 192, "lstm": 256}
DEFAULT_DEPTHS = {"gpt": 3, "lstm": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Generic[PolicyT]):
    """One training run."""

    policy: PolicyT
    """Settings of the policy that --policy names."""
    policy_name: tyro.conf.Suppress[str] = "clip-norm"
    """The name given to --policy, for the report."""
    clip: float = math.inf
    """A limit for the norm of the model beside the policy's own, of which the smaller one holds;
    steps that the policy does not leave out are clipped to it."""
    model: Literal["gpt", "lstm"] = "gpt"
    """Byte-level GPT of about 1.5M parameters, or an LSTM of about 1.2M."""
    layout: Layout = "ddp"
    """How the ranks share the model. tp needs 2 ranks, hsdp and fsdp2+tp need 4; zero1 to zero3
    need DeepSpeed."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the forward pass computes in; parameters and gradients stay in float32, except under
    ZeRO."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain SGD as in the LSTM papers on exploding gradients."""
    steps: int = 300
    """Where training ends, counted from the very first step (also with --resume)."""
    batch: int = 16
    """Sequences a step, divided over the data-parallel ranks: the same training on any number of
    ranks."""
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
    corrupt: float = 0.0
    """Share of the batches that are random bytes, as of a broken file."""
    out: Path = Path("runs/main")
    """Folder for history.jsonl, report.png and checkpoints/. Without --resume an earlier run in it
    is replaced."""
    resume: bool = False
    """Go on from the newest checkpoint in --out that is not damaged; from the start where there is
    none. Also done without it when torchrun or SLURM starts a run again."""
    save_every: int = 50
    """Steps between checkpoints, of which the last two are kept; with 0, one only when asked to
    stop."""
    tensor_norms: int = 0
    """Every so many steps, counted from the first one of this process, a row of history.jsonl has
    the norm of each tensor that rank 0 has a part of; with 0, none has."""
    seed: int = 0
    """Seed of the first weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs where there is one for each rank of the machine, else the CPU."""
    timeout: float = 120.0
    """Seconds a rank waits for the others before it gives up, as when a machine or a cable is
    lost."""

    @property
    def shape(self) -> dict[str, Any]:
        """What decides the parameters' names and sizes."""
        width = DEFAULT_WIDTHS[self.model] if self.width is None else self.width
        depth = DEFAULT_DEPTHS[self.model] if self.depth is None else self.depth
        return {"model": self.model, "width": width, "depth": depth}


def read_options(args: Sequence[str]) -> Options[Any]:
    """The options in `args`, checked as far as one rank can check them.

    Raises:
        UserError: a mistake.
    """
    name, rest = _policy_name(args)
    preset = POLICIES[name]
    options = _parse(type(preset), Options(policy=preset, policy_name=name), rest)
    _check_numbers(options)
    _check_ranks(options, int(os.environ.get("WORLD_SIZE", "1")))
    return options if math.isinf(options.clip) else _clip_as_well(options)


def _clip_as_well(options: Options[Any]) -> Options[Any]:
    try:
        policy = options.policy & distclip.ClipNorm(options.clip, options.policy.norm_type)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--clip {options.clip} with --policy {options.policy_name}: {error}"
        ) from None
    return dataclasses.replace(options, policy=policy)


def _policy_name(args: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --policy, and the other arguments.

    tyro is given one dataclass, whose fields are flags anywhere on the line; a union of dataclasses
    would need subcommands.
    """
    name, rest, words = "clip-norm", [], iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--policy":
            name = value if equals else next(words, "")
        elif flag != "--local_rank":  # DeepSpeed's launcher adds it; the environment has it too
            rest.append(word)
    if name not in POLICIES:
        given = one_line(name) or "(nothing)"
        raise UserError(f"--policy {given}: there are {', '.join(POLICIES)}")
    return name, rest


def _parse(policy: type, default: Options[Any], args: list[str]) -> Options[Any]:
    """tyro's reading of `args`; the box in which it prints an error becomes one line."""
    names = ", ".join(POLICIES)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                Options[policy],
                prog="train.py",
                description=f"Trains a small model.\n--policy NAME takes one of: {names}.",
                default=default,
                args=args,
                console_outputs=os.environ.get("RANK", "0") == "0",
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(_one_line(printed.getvalue())) from None


def _one_line(box: str) -> str:
    """The first paragraph inside one of tyro's boxes."""
    inside = [line.strip("│ ") for line in box.splitlines()[1:]]
    ends = (n for n, line in enumerate(inside) if not line.strip("─╰╯"))
    text = " ".join(inside[: next(ends, None)])
    return text.replace(" .", ".") or "the options cannot be read (--help lists them)"


def _check_numbers(options: Options[Any]) -> None:
    for name in ("steps", "batch", "context"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    for name in ("save_every", "warmup", "tensor_norms"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: 0 or more")
    if options.tensor_norms and options.layout.startswith("zero"):
        raise UserError(f"--tensor-norms with --layout {options.layout}: DeepSpeed has none yet")
    for name in ("lr", "timeout"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} {getattr(options, name)}: a finite number above 0")
    if not 0 <= options.corrupt <= 1:
        raise UserError(f"--corrupt {options.corrupt}: a share, 0 to 1")
    width, depth = options.shape["width"], options.shape["depth"]
    if width < 1 or depth < 1:
        raise UserError(f"--width {width} --depth {depth}: both at least 1")
    if options.model == "gpt" and width % (2 * HEADS):
        raise UserError(f"--width {width}: a gpt of {HEADS} heads needs a multiple of {2 * HEADS}")


def _check_ranks(options: Options[Any], num_ranks: int) -> None:
    """Checks the number of ranks before any of them waits for a process group."""
    layout, needed = options.layout, MIN_RANKS.get(options.layout, 1)
    if num_ranks < needed:
        how = f"torchrun --standalone --nproc-per-node={needed} -m launch.train ..."
        if "SLURM_JOB_ID" in os.environ:
            how = "raise --nodes, --ntasks-per-node (srun) or NPROC_PER_NODE (torchrun)"
        raise UserError(
            f"--layout {layout} needs {needed} ranks or more and there are {num_ranks}: {how}"
        )
    if layout in ("hsdp", "fsdp2+tp") and num_ranks % 2:
        raise UserError(
            f"--layout {layout} pairs the ranks up and there are {num_ranks}: use an even number"
        )
    if layout == "tp" and (HEADS % num_ranks or options.context % num_ranks):
        raise UserError(
            f"--layout tp splits {HEADS} heads and {options.context} positions evenly and there "
            f"are {num_ranks} ranks: use {HEADS} or fewer, and a --context they divide"
        )
    num_data_ranks = {"tp": 1, "fsdp2+tp": num_ranks // 2}.get(layout, num_ranks)
    if options.batch % num_data_ranks:
        raise UserError(
            f"--batch {options.batch} cannot be shared out evenly over {num_data_ranks} data ranks"
        )
