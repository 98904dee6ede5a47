"""`attach` and `detach`: the engine's own clipping is off in between; bad input changes nothing."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch.distributed as dist

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engines
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


def own_rule_comes_back(stage: int, dtype: str) -> None:
    with engine(config(stage, dtype, gradient_clipping=0.5)) as made:
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.5, rel=1e-2)
        if dist.get_rank() == 0:
            with pytest.warns(UserWarning, match=r"gradient_clipping=0\.5.*the policy holds"):
                handle = attach(made, distclip.ClipNorm(0.25))
        else:
            handle = attach(made, distclip.ClipNorm(0.25))
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.25, rel=1e-5)
        handle.detach()
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.5, rel=1e-2)
        engines.attach_quietly(made, distclip.ClipNorm(0.125))
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.125, rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")]
)
def test_the_engines_own_rule_is_off_and_comes_back(
    two_engine_ranks: Ranks, stage: int, dtype: str
) -> None:
    two_engine_ranks.run(own_rule_comes_back, stage, dtype)


def state_of(made: Any) -> tuple[Any, ...]:
    inner = getattr(made.optimizer, "optimizer", made.optimizer)
    hooks = (len(inner._optimizer_step_pre_hooks), len(inner._optimizer_step_post_hooks))
    own = (vars(made.optimizer).get("step"), getattr(made.optimizer, "clip_grad", None))
    return hooks, own, made._config.gradient_clipping


def no_engines() -> None:
    engines.load()
    with pytest.raises(
        ValueError, match=r"cannot attach to a Sequential: it is no engine.*deepspeed\.initialize"
    ):
        attach(engines.make_model())
    with pytest.raises(ValueError, match="cannot attach to a NoneType"):
        attach(None)
    with (
        engine(config(0), make_optimizer=None) as made,
        pytest.raises(ValueError, match=r"it has no optimizer.*attach afterwards"),
    ):
        attach(made)


def test_what_is_no_engine_is_an_error(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(no_engines)


def bad_input() -> None:
    with engine(config(2)) as made:
        before = state_of(made)
        with pytest.raises(ValueError, match=r"no behaviour has that name"):
            attach(made, on_nonfinite="ignore")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"cannot exclude 'nothing'"):
            attach(made, distclip.AGC(exclude=("nothing",)))
        known = type(made.optimizer)
        made.optimizer.__class__ = type("NewZeroOptimizer", (known,), {})
        with pytest.raises(
            ValueError,
            match=r"cannot clip what NewZeroOptimizer steps.*DeepSpeedZeroOptimizer_Stage3",
        ):
            attach(made)
        made.optimizer.__class__ = known
        made.optimizer.swap_optimizer = True
        with pytest.raises(ValueError, match="NVMe offload keeps gradients in files"):
            attach(made)
        made.optimizer.swap_optimizer = False
        assert state_of(made) == before
        handle = attach(made)
        attached = state_of(made)
        with pytest.raises(ValueError, match=r"again: distclip.adapters.deepspeed does already"):
            attach(made)
        assert state_of(made) == attached != before
        handle.detach()
        assert state_of(made) == before


def test_bad_input_leaves_the_engine_as_it_was(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(bad_input)


def versions() -> None:
    deepspeed = engines.load()
    with engine(config(2)) as made:
        for version in ("0.14.5", "0.20.0", "1.0"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(deepspeed, "__version__", version)
                with pytest.warns(
                    UserWarning, match=rf"tested with deepspeed 0\.16\.9 to 0\.19\.8.*{version}"
                ):
                    handle = attach(made)
                handle.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(made).detach()  # no warning of a `gradient_clipping` that nobody set


def test_other_versions_are_warned_of(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(versions)
