"""The rows of a `History` in TensorBoard and in Weights & Biases, under the names of the field."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distclip.arguments import shown

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

Shown = float | int | str

# As the integrations of transformers have them, where they have one.
_NAMES = {
    "step": "train/global_step",
    "total_norm": "train/grad_norm",
    "limit": "train/grad_norm_limit",
    "coefficient": "train/clip_coefficient",
    "lr": "train/learning_rate",
}
_STEP = _NAMES["step"]
_GROUP_NAMES = {
    "norm": _NAMES["total_norm"],
    "limit": _NAMES["limit"],
    "coefficient": _NAMES["coefficient"],
}


class TensorBoardWriter:
    """Writes each row of a `History` to a folder that TensorBoard shows.

    The total norm is `train/grad_norm`, its limit `train/grad_norm_limit`, the coefficient
    `train/clip_coefficient`, and `lr` is `train/learning_rate`. The norm of a tensor is
    `grad_norm/<its name>`, and that of a parameter group `train/grad_norm/<its name>`. Other values
    are `train/<name>`, unless the name has a "/": `**{"eval/loss": 2.1}` keeps it. Strings are
    texts; NaN and infinity are shown as marks.

    The folder is opened with the first row, which only rank 0 writes. What an earlier start of the
    run wrote there for that step and later ones is hidden.

    Raises:
        ImportError: TensorBoard is not installed (on every rank).

    Example:
        >>> import tempfile, distclip
        >>> from distclip.monitoring import TensorBoardWriter
        >>> folder = tempfile.mkdtemp()
        >>> history = distclip.History(folder, writers=[TensorBoardWriter(folder)])
        >>> history.close()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        _check_installed("tensorboard", type(self).__name__)
        self._folder = os.fspath(folder)
        self._events: SummaryWriter | None = None

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(self._folder, purge_step=step)
        for name, value in _named(row).items():
            if isinstance(value, str):
                self._events.add_text(name, value, step)
            elif name != _STEP:
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


class WandbWriter:
    """Writes each row of a `History` to a run of Weights & Biases.

    Names are those of `TensorBoardWriter`, over `train/global_step`. The run is the one that is
    open when the first row is written, else `wandb.init(**init)` makes one, and `close` finishes
    it. Only rank 0 writes; other ranks open nothing.

    Rows may come a few steps late, and W&B drops figures of a step before the last one. So a row is
    logged without `step=`, and so should be what else goes to the same run.

    Args:
        init: for `wandb.init`, such as `project="..."`.

    Raises:
        ImportError: W&B is not installed (on every rank).
    """

    def __init__(self, **init: Any) -> None:
        _check_installed("wandb", type(self).__name__)
        self._init = init
        self._run: wandb.Run | None = None
        self._is_own = False
        self._others: set[str] = set()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        run = self._run or self._opened()
        named = _named(row)
        others = {name for name in named if not name.startswith(("train/", "grad_norm/"))}
        for name in sorted(others - self._others):
            run.define_metric(name, step_metric=_STEP)
        self._others |= others
        run.log(named)

    def _opened(self) -> wandb.Run:
        import wandb

        self._is_own = wandb.run is None
        self._run = wandb.run or wandb.init(**self._init)
        self._run.define_metric(_STEP)
        for names in ("train/*", "grad_norm/*"):
            self._run.define_metric(names, step_metric=_STEP)
        return self._run

    def close(self) -> None:
        if self._run is not None and self._is_own:
            self._run.finish()
        self._run = None


def _check_installed(package: str, writer: str) -> None:
    spec = importlib.util.find_spec(package)
    # W&B leaves a folder "wandb" where it runs, which Python could import too.
    if spec is None or spec.origin is None:
        raise ImportError(
            f"cannot make a {writer}: the package {package} is not installed. Run `pip install "
            f"{package}`, on every machine."
        )


def _named(row: Mapping[str, Any]) -> dict[str, Shown]:
    named: dict[str, Shown] = {}
    for name, value in _pairs(row):
        if name in named:
            raise ValueError(
                f"two figures of a row have the name {name!r}: {shown(named[name])} and "
                f"{shown(value)}. Give the one that you append another name."
            )
        named[name] = int(value) if isinstance(value, bool) else value
    return named


def _pairs(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if key == "groups":
            for group, figures in value.items():
                for name, figure in figures.items():
                    yield f"{_GROUP_NAMES[name]}/{group}", figure
        elif key == "tensor_norms":
            yield from ((f"grad_norm/{name}", norm) for name, norm in value.items())
        elif key == "nonfinite_parameters":
            yield f"train/{key}", "; ".join(f"{name} on ranks {on}" for name, on in value.items())
        elif key != "norm_type":
            yield _NAMES.get(key, key if "/" in key else f"train/{key}"), value
