"""From megatron-core's attributes on plain tensors, distclip reads the norm that Megatron does."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import ClipNorm, Clipper, LayoutError
from distclip.adapters import MegatronLayouts, megatron_layouts
from tests.conftest import pool
from tests.support import reference
from tests.support.megatron_models import on_cpu, parallel_state
from tests.support.ranks import Ranks, device_of, mesh, same_bits_everywhere
from tests.support.tolerances import NORM, TOLERANCES

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed (tests/peers.txt)",
)


def clips_to(
    expected: Tensor, named: list[tuple[str, nn.Parameter]], on: DeviceMesh, layouts: Any, p: float
) -> None:
    """The Clipper finds the norm `expected` by one collective, and scales by it."""
    max_norm = 0.3 * expected.item()
    before = {name: param.grad.clone() for name, param in named}
    distinct = [layouts.pp] if layouts.pp in (on.mesh_dim_names or ()) else []
    clipper = Clipper(named, ClipNorm(max_norm, p), mesh=on, distinct=distinct, layouts=layouts)
    clipper.plan.verify()
    with CommDebugMode() as comms:
        report = clipper.clip_()
    assert comms.get_total_counts() == 1
    torch.testing.assert_close(report.total_norm.cpu().double(), expected, **NORM)
    assert same_bits_everywhere(report.total_norm)
    assert report.coefficient < 0.31  # it did clip
    factor = max_norm / expected.item()
    for name, param in named:
        torch.testing.assert_close(param.grad, before[name] * factor, **TOLERANCES[torch.float32])


class Style(NamedTuple):
    """What a parameter is: its whole shape, the dim that tensor ranks split, and its attributes."""

    shape: tuple[int, ...]
    split_dim: int | None
    attributes: dict[str, object]


def split_style(shape: tuple[int, ...], dim: int, partition_dim: int, **more: object) -> Style:
    marks = {"tensor_model_parallel": True, "partition_dim": partition_dim}
    return Style(shape, dim, marks | more)


STYLES = {
    "column.weight": split_style((6, 4), 0, 0, allreduce=True),
    "row.weight": split_style((5, 6), 1, 1, allreduce=True),
    "row.bias": Style((5,), None, {"allreduce": True, "sequence_parallel": False}),
    "norm.weight": Style((4,), None, {}),
    "router.weight": Style((4, 3), None, {"tensor_model_parallel": False, "partition_dim": -1}),
    "embedding": split_style((8, 3), 0, 0, shared_embedding=True),
}
EXPERT_STYLES = {  # the first dim stacks experts
    "expert.fc1": split_style((4, 6, 3), 1, 0, allreduce=False),
    "expert.bias": Style((4, 3), None, {"allreduce": False}),
}


def whole_gradient(*key: object, shape: tuple[int, ...]) -> Tensor:
    """The same on every rank that asks with the same key."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randn(shape, generator=generator)


def local_param(
    name: str, whole: Tensor, attributes: dict[str, object], device: str
) -> tuple[str, nn.Parameter]:
    param = nn.Parameter(torch.zeros(whole.shape, device=device_of(device)))
    param.grad = whole.clone().to(device_of(device))
    vars(param).update(attributes)
    return name, param


def attributes_are_read(axes: tuple[str, str], device: str) -> None:
    """Two stages of two tensor ranks; the embedding is tied between the stages."""
    on = mesh((2, 2), axes, device)
    stage, tensor_rank = divmod(dist.get_rank(), 2)
    layouts = megatron_layouts if axes == ("pp", "tp") else MegatronLayouts(pp=axes[0], tp=axes[1])
    for p in (2.0, 1.0):
        wholes, named = [], []
        for at in (0, 1):
            for name, (shape, dim, attributes) in STYLES.items():
                tied = name == "embedding"
                whole = whole_gradient(name, 0 if tied else at, shape=shape)
                mine = whole if dim is None else whole.chunk(2, dim)[tensor_rank]
                if not (tied and at == 1):
                    wholes.append(whole)
                if at == stage:
                    second = {"shared": True} if tied and at == 1 else {}
                    local_name = "output_layer" if second else name
                    named.append(local_param(local_name, mine, attributes | second, device))
        clips_to(reference.total_norm(wholes, p), named, on, layouts, p)


@pytest.mark.parametrize("axes", [("pp", "tp"), ("stage", "model")])
def test_attributes_of_dense_parameters_are_read(four_ranks: Ranks, axes: tuple[str, str]) -> None:
    four_ranks.run(attributes_are_read, axes, four_ranks.device)


def attributes_of_experts_are_read(device: str) -> None:
    """Four experts, on two expert ranks times two tensor ranks, or whole ones on four ranks."""
    on = mesh((2, 2), ("ep", "tp"), device)
    rank, (expert_rank, tensor_rank) = dist.get_rank(), divmod(dist.get_rank(), 2)
    dense = {name: style for name, style in STYLES.items() if name != "embedding"}
    for layouts in (megatron_layouts, MegatronLayouts(ep=("ep", "tp"), etp=())):
        for p in (2.0, 1.0):
            wholes, named = [], []
            for name, (shape, dim, attributes) in (dense | EXPERT_STYLES).items():
                wholes.append(whole := whole_gradient(name, shape=shape))
                divided = name in dense or layouts is megatron_layouts
                if name in EXPERT_STYLES:
                    whole = whole.chunk(2, 0)[expert_rank] if divided else whole.chunk(4, 0)[rank]
                mine = whole.chunk(2, dim)[tensor_rank] if dim is not None and divided else whole
                named.append(local_param(name, mine, attributes, device))
            clips_to(reference.total_norm(wholes, p), named, on, layouts, p)


def test_attributes_of_experts_are_read(four_ranks: Ranks) -> None:
    four_ranks.run(attributes_of_experts_are_read, four_ranks.device)


def what_the_mesh_lacks_is_named(device: str) -> None:
    on = mesh((2, 2), ("dp", "model"), device)
    for name, axis in (("column.weight", "tp"), ("expert.bias", "ep")):
        shape, _, attributes = (STYLES | EXPERT_STYLES)[name]
        named = [local_param(name, torch.ones(shape), attributes, device)]
        expected = rf"{name}.*names the axes \['{axis}'\].*\['dp', 'model'\]"
        with pytest.raises(LayoutError, match=expected):
            Clipper(named, mesh=on, layouts=megatron_layouts)
        with pytest.raises(LayoutError, match=rf"{name}.*pass the `mesh=`"):
            Clipper(named, layouts=megatron_layouts)
    plain = [
        local_param(name, torch.ones(4), STYLES[name].attributes, device)
        for name in ("norm.weight", "router.weight")
    ]
    assert Clipper(plain, mesh=on, layouts=megatron_layouts).clip_().clipped


def test_an_axis_that_a_parameter_needs_and_the_mesh_lacks_is_an_error(four_ranks: Ranks) -> None:
    four_ranks.run(what_the_mesh_lacks_is_named, four_ranks.device)


def test_one_process_needs_no_mesh() -> None:
    wholes = {name: whole_gradient(name, shape=style.shape) for name, style in STYLES.items()}
    named = [
        local_param(name, whole, STYLES[name].attributes, "cpu") for name, whole in wholes.items()
    ]
    report = Clipper(named, ClipNorm(1.0), layouts=distclip.adapters.megatron_layouts).clip_()
    assert report.clipped
    expected = reference.total_norm(list(wholes.values()))
    torch.testing.assert_close(report.total_norm.double(), expected, **NORM)


@contextmanager
def megatron_gpt(sizes: dict[str, int]) -> Iterator[tuple[nn.Module, Any]]:
    """Megatron's own GPT on this rank, on the CPU, and Megatron's parallel state."""
    with on_cpu(), parallel_state(sizes) as state:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        experts = 4 if "expert_model_parallel_size" in sizes else None
        config = TransformerConfig(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=2,
            use_cpu_initialization=True,
            pipeline_dtype=torch.float32,
            num_moe_experts=experts,
            add_bias_linear=experts is None,
            **sizes,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=experts),
            vocab_size=12,
            max_sequence_length=8,
            share_embeddings_and_output_weights=True,
            pre_process=state.is_pipeline_first_stage(),
            post_process=state.is_pipeline_last_stage(),
        )
        yield model, state


def fill_gradients(model: nn.Module, state: Any) -> None:
    """Random ones, equal on ranks that hold copies."""
    for name, param in model.named_parameters():
        expert = not getattr(param, "allreduce", True)
        tied = getattr(param, "shared_embedding", False)
        key: list[object] = ["tied"] if tied else [name, state.get_pipeline_model_parallel_rank()]
        if getattr(param, "tensor_model_parallel", False):
            of_expert, of_tensor = (
                state.get_expert_tensor_parallel_rank,
                state.get_tensor_model_parallel_rank,
            )
            key.append(of_expert() if expert else of_tensor())
        if expert:
            key += ["expert", state.get_expert_model_parallel_rank()]
        param.grad = whole_gradient(*key, shape=param.shape)


def megatrons_norm(model: nn.Module, state: Any, p: float) -> Tensor:
    """By Megatron's functions, as its chained optimizers combine them.

    Megatron's 2-norm needs a GPU; other powers do not.
    """
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    counted = [
        param
        for param in model.parameters()
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)
    ]
    groups = {
        True: state.get_model_parallel_group(),
        False: state.get_expert_tensor_model_pipeline_parallel_group(),
    }
    grads = {
        dense: [q.grad for q in counted if getattr(q, "allreduce", True) == dense]
        for dense in groups
    }
    norms = [get_grad_norm_fp32(grads[dense], p, groups[dense]) for dense in groups if grads[dense]]
    return torch.tensor(norms, dtype=torch.float64).pow(p).sum() ** (1 / p)


class Setup(NamedTuple):
    """How Megatron splits a model over four ranks, and the mesh and layouts for it."""

    sizes: dict[str, int]
    axes: tuple[str, str]
    layouts: MegatronLayouts
    marks: set[str]  # that its parameters have


def sizes(tensor: int, pipeline: int, expert: int | None = None, **more: int) -> dict[str, int]:
    dense = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return dense | ({} if expert is None else {"expert_model_parallel_size": expert}) | more


WHOLE_EXPERTS = MegatronLayouts(ep=("ep", "tp"), etp=())
SETUPS = {
    "pp x tp": Setup(sizes(2, 2), ("pp", "tp"), megatron_layouts, {"tensor", "shared"}),
    "pp x dp": Setup(sizes(1, 2), ("pp", "dp"), megatron_layouts, {"tensor", "shared"}),
    "ep x tp": Setup(sizes(2, 1, 2), ("ep", "tp"), megatron_layouts, {"tensor", "expert"}),
    "ep x tp, whole experts": Setup(
        sizes(2, 1, 4, expert_tensor_parallel_size=1),
        ("ep", "tp"),
        WHOLE_EXPERTS,
        {"tensor", "expert"},
    ),
}


def marks_of(params: list[Any]) -> set[str]:
    found = {
        "tensor": any(getattr(p, "tensor_model_parallel", False) for p in params),
        "expert": any(not getattr(p, "allreduce", True) for p in params),
        "shared": any(getattr(p, "shared", False) for p in params),
    }
    return {mark for mark, is_there in found.items() if is_there}


def has_megatrons_norm(model: nn.Module, state: Any, setup: Setup, p: float) -> None:
    params = list(model.parameters())
    fill_gradients(model, state)
    norm = megatrons_norm(model, state, p)
    before = [q.grad.clone() for q in params]
    policy = ClipNorm(0.3 * norm.item(), p)
    report = Clipper(model, policy, mesh=mesh((2, 2), setup.axes), layouts=setup.layouts).clip_()
    assert report.coefficient < 0.31
    # Megatron's norm is in float32.
    torch.testing.assert_close(report.total_norm.double(), norm, rtol=2e-6, atol=0)
    assert same_bits_everywhere(report.total_norm)
    for param, was in zip(params, before, strict=True):
        torch.testing.assert_close(param.grad, was * report.coefficient, rtol=2e-7, atol=0)


def megatrons_own_models() -> None:
    for kind, setup in SETUPS.items():
        with megatron_gpt(setup.sizes) as (model, state):
            last_stage = {"shared"} if state.get_pipeline_model_parallel_rank() == 1 else set()
            assert marks_of(list(model.parameters())) == setup.marks - {"shared"} | last_stage, kind
            for p in (1.0, 3.0):
                has_megatrons_norm(model, state, setup, p)
            if setup.layouts is not megatron_layouts:
                with pytest.raises(LayoutError, match=r"among 2 ranks.*among 1.*etp=\(\)"):
                    Clipper(model, mesh=mesh((2, 2), setup.axes), layouts=megatron_layouts)


@needs_megatron
def test_megatrons_own_models_have_megatrons_norm() -> None:
    pool(4).run(megatrons_own_models)
