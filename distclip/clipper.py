"""The object that users hold: a plan for their parameters, and what their policies remember."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from distclip import nonfinite, param_groups, parameters
from distclip.arguments import (
    as_axes,
    as_flag,
    as_interval,
    as_modules,
    check_function,
    check_mesh_type,
)
from distclip.decision import Decision
from distclip.nonfinite import OnNonFinite
from distclip.norms.make_plan import make_plan, with_tensor_groups
from distclip.norms.plan import Plan
from distclip.param_groups import NamedParameters, ParamGroups
from distclip.parameters import GradientFunction, Parameters
from distclip.policies import ClipNorm, Policy, check_policy, state_dict
from distclip.report import Report
from distclip.sharding.layout import LayoutFunction
from distclip.sharding.one_shot import SymmetricMemory
from distclip.sharding.read import read_layouts
from distclip.torch_private import outside_of_graphs
from distclip.training import folding, grad_scaler, optimizers, wrappers
from distclip.training.calls import Calls
from distclip.training.held import Held, kept_between_calls
from distclip.training.optimizers import check_attached
from distclip.training.step_hook import AttachedClipper
from distclip.training.step_in_backward import BackwardClipper
from distclip.training.wrappers import Optimizers


class Clipper:
    """Clips the gradients of a model, however it is sharded.

    Args:
        model_or_parameters: an `nn.Module` (FSDP1 needs it, and parameters keep their names), an
            iterable of parameters, or parameter groups `{"params", "policy", "name"}`, whose
            "params" are either, also with the keys of an optimizer's groups. Make the clipper after
            the model has been wrapped and sharded.
        policy: how large the gradients may be. Parameter groups without a policy use this one.
        mesh: a `DeviceMesh` over all ranks that train together, and no others: a slice of a mesh
            where ranks along its other axes train apart. If omitted, it is found from the
            parameters' DTensors.
        distinct: the mesh axes whose ranks hold different parameters.
        layouts: for sharding that tensors do not show: `(name, parameter) -> Layout`, or None to
            read the tensor.
        gradient: where a parameter's gradient is, if not in `.grad`: `parameter -> Tensor`, or None
            where it has none (Megatron's `main_grad`, buffers on the host). The returned tensor is
            scaled in place; its elements may not share memory.
        on_nonfinite: when the total norm is NaN or infinite, "propagate" scales by limit / norm,
            as torch does; "raise" raises on every rank and leaves the gradients as they are;
            "skip" leaves them as they are, and `step` does not step the optimizer; "zero" sets
            them to zero.
        max_consecutive_skips: how many steps in a row may be left out before a call raises: those
            that are non-finite, with "skip" and "zero", and those that a policy vetoes, such as
            `SkipSpike`.
        overlap: measure large gradients during backward, soon after they are final: under FSDP2
            after their reduce-scatter, under DDP after their bucket's all-reduce (the clipper needs
            the module, and takes DDP's one communication hook), plain parameters at once. A
            gradient that has changed since, and any other, is measured when the clipper is called.
            A write that torch does not count (`GradScaler.unscale_`, a collective, `.data`, NumPy)
            is found by a sample of the elements: all of a short gradient, else some of each row.
            One that misses the sample, such as one to a single element through `.data`, is not
            seen. On an accelerator, policies with limits per tensor or unit and gradients on the
            CPU are measured after backward.
        modules: with a list of parameters, the model that they are from, or several, wrapped as
            they are trained: parameters without a name have their names in it, those that the
            optimizer gets later too, and FSDP1 keeps its layout there. Nothing but the list is
            clipped.
        tensor_norms: measure the norm of every tensor, for `report.tensor_norms()`: True for each
            call, or n for the first call and every n-th after it. The sums travel in the same
            all-reduce, 8 bytes for each tensor of the model; other calls send zeros. Nothing that
            clips depends on them. Groups with limits per unit and FSDP1's parameters are read once
            more for it. The same on every rank.
        symmetric_memory: send the sums through memory that all ranks read, instead of an
            all-reduce: where all ranks of the mesh are on one machine with NVLink, and torch has
            such memory there. Where it has not, `print(clipper.plan)` says why, and the norm comes
            by the all-reduce. Not measured yet. The same on every rank.

    Raises:
        LayoutError: it is unknown which ranks hold which elements.
        ValueError, TypeError: something that cannot be clipped.

    Collective: at construction, an all-gather of a few numbers where pipeline stages have norms per
        tensor or unit, one of the names of their tensors with `tensor_norms`, and one where tensors
        count as copies along an axis that nothing speaks of (see docs/sharding.md), or may do so on
        other ranks: with `mesh` or pipeline stages. All ranks of the mesh must make the clipper,
        and call it every step. Where its axes are a part of the world, a collective is one along
        each axis; no process group is made. On an accelerator one all-reduce, which makes NCCL's
        communicators before the first step; two all-gathers for `symmetric_memory`; and for
        `tensor_norms` one all-reduce, in which the ranks find out whether all ask for them.
    """

    @outside_of_graphs
    @kept_between_calls
    def __init__(
        self,
        model_or_parameters: Parameters | ParamGroups,
        policy: Policy[Any] = ClipNorm(1.0),  # noqa: B008 - frozen
        *,
        mesh: DeviceMesh | None = None,
        distinct: Sequence[str] = ("pp",),
        layouts: LayoutFunction | None = None,
        gradient: GradientFunction | None = None,
        on_nonfinite: OnNonFinite = "propagate",
        max_consecutive_skips: int = 20,
        overlap: bool = False,
        tensor_norms: bool | int = False,
        symmetric_memory: bool = False,
        modules: nn.Module | Iterable[nn.Module] = (),
    ) -> None:
        max_skips = nonfinite.check_mode(on_nonfinite, max_consecutive_skips)
        check_mesh_type(mesh)
        distinct = as_axes("distinct", distinct)
        check_function("layouts", layouts, "`(name, parameter) -> distclip.Layout`, or None")
        check_function("gradient", gradient, "`parameter -> its gradient`, or None")
        overlap = as_flag("overlap", overlap)
        shared = SymmetricMemory() if as_flag("symmetric_memory", symmetric_memory) else None
        if overlap and gradient is not None:
            raise ValueError(
                "cannot measure gradients during backward with gradient=: hooks see what backward "
                "writes to `.grad`, and yours lie elsewhere. Leave out one of the two."
            )
        self.policy = policy
        sources = param_groups.list_sources(model_or_parameters, policy)
        modules = as_modules("modules", modules)
        check_policy(policy)
        for group in sources:
            check_policy(group.policy, group.name)
        interval = as_interval("tensor_norms", tensor_norms)
        rule = f"on_nonfinite={on_nonfinite}, max_consecutive_skips={max_skips}"
        if interval:
            rule += f", tensor_norms={interval}"

        def plan_for(read: NamedParameters) -> Plan:
            sharded = read_layouts(read.named, read.modules, mesh, distinct, layouts)
            return make_plan(sharded, read.groups, rule, shared)

        self._held = Held(
            sources,
            modules,
            plan_for,
            partial(with_tensor_groups, symmetric_memory=shared) if interval else None,
            declared=layouts is not None,
            overlap=overlap,
        )
        skips = nonfinite.SkipCounter(max_skips)
        self._calls = Calls(self._held, on_nonfinite, skips, gradient, interval)

    @property
    def plan(self) -> Plan:
        """Which tensors this rank counts, and the ranks that it reduces over, as they are now."""
        return self._held.plan

    @property
    def skipped(self) -> Tensor:
        """How many calls found a norm that was not finite, with "skip" or "zero", or that a policy
        vetoed; int64 scalar.
        """
        return self._calls.skips.total.clone()

    @outside_of_graphs
    def clip_(
        self,
        optimizer: Optimizers | None = None,
        scaler: GradScaler | None = None,
        scale: float | Tensor | None = None,
        step: int | None = None,
        loss: float | Tensor | None = None,
    ) -> Report:
        """Scales the gradients in place.

        Call it after backward and before `optimizer.step()`, on every rank.

        With a scaler the gradients are unscaled as well, in the same pass; `scaler.step(optimizer)`
        and `scaler.update()` follow as always. An overflow on any rank makes all of them skip. Pass
        all optimizers that step what the clipper holds: `clip_([first, second], scaler=scaler)`.
        Where `scaler.unscale_` was called before, nothing is unscaled again. Wrappers of optimizers
        (accelerate's, Lightning's, torchtitan's) are seen through; `scaler.step` may follow for the
        wrapper or for what is inside.

        Where a policy vetoes the step, and where the norm is not finite with on_nonfinite="skip",
        the gradients stay as they are and `report.skipped` is true. A scaler then leaves out the
        step, and halves its scale, because it takes it for an overflow. Without one, the step is
        yours: `if not report.skipped: optimizer.step()`, which waits for the norm, or let `step`
        or `attach` take it.

        Args:
            scale: a factor that the gradients still need, such as 1 / num_tokens: a finite number,
                or a tensor with one element that is not waited for. The same on every rank. It
                costs no pass of its own, and the figures of the report are those after it.
            step: the number of the step, if you count them: a rank that has left out a call, or
                made one more, is then found in its next call. The same on every rank.
            loss: for a policy that may leave out steps, such as `SkipSpike`: this rank's loss, not
                multiplied by a loss scale; a number, or a tensor with one element that is not
                waited for. The mean over the ranks that give one is judged, so the last pipeline
                stage may be the only one. Under DDP all ranks must give theirs, or none.

        Raises:
            LayoutError: on every rank, where a rank makes another call: of a Clipper with other
                policies or another `on_nonfinite`, of another Clipper, or with another `step`. On
                an accelerator the norm is NaN first, and the error follows four steps later.
            CollectiveError: on all ranks that are left, where one has ended, was stopped or does
                not call: it names those that are missing. No gradient is changed then.
            NonFiniteGradientError: with on_nonfinite="raise", on every rank together; after
                `max_consecutive_skips` steps with a norm that is not finite.
            SkippedStepsError: after as many steps, on every rank together, where a policy vetoes
                this one too.
            ValueError: the optimizers do not step the parameters that the clipper holds, and a
                scaler or `scale` was given; `scale` is no finite number; a policy returned a limit
                that is negative or NaN although the norm is finite; `loss` was given, and no policy
                may leave out steps.
            TypeError: an argument, or a limit that a policy returned, is of another type.
            RuntimeError, AssertionError: torch's own, where `scaler.unscale_` raises them.

        Collective: one all-reduce of a few numbers; none where nothing is sharded, but for `loss`.
            Where some rank has a `Partial` gradient, the ranks say which, reduce them, and
            all-reduce again.
        """
        decision = self.decide(optimizer, scaler, scale, step, loss)
        decision.apply_()
        return decision.report

    @outside_of_graphs
    @torch.no_grad()
    def decide(
        self,
        optimizer: Optimizers | None = None,
        scaler: GradScaler | None = None,
        scale: float | Tensor | None = None,
        step: int | None = None,
        loss: float | Tensor | None = None,
    ) -> Decision:
        """Measures the gradients, makes the one all-reduce and asks the policy. Writes nothing.

        `decision.apply_()` writes; `decision.report` says what was found. For trainers that do
        something between the two. Each call counts as one step: for what the policy remembers, and
        for `max_consecutive_skips`.

        Args, Raises, Collective: as `clip_`. A scaler learns that its gradients are unscaled from
            `apply_`.
        """
        grad_scaler.check_scaler(scaler)
        stepped = wrappers.list_optimizers(optimizer)
        factor = grad_scaler.inverse_scale(scaler, stepped)
        if scale is not None:
            given = parameters.as_scalar(scale, self.plan.device)
            factor = given if factor is None else factor.to(given) * given
        on_apply = None
        if scaler is not None and scaler.is_enabled():
            on_apply = partial(grad_scaler.record, scaler, stepped)
        return self._calls.decide(stepped, factor, on_apply, step, loss)

    @outside_of_graphs
    def step(
        self,
        optimizer: Optimizers,
        scaler: GradScaler | None = None,
        scale: float | Tensor | None = None,
        closure: Callable[[], Any] | None = None,
        step: int | None = None,
        loss: float | Tensor | None = None,
    ) -> Report:
        """`clip_` and `optimizer.step()`, or `scaler.step(optimizer)`.

        `scaler.update()` remains yours.

        Each optimizer with `fused=True` gets the coefficient of its parameter group, the loss scale
        and `scale` as one number (`grad_scale`), and its kernel writes the gradients; those of
        others are clipped before. The result is the same up to rounding, except that a product
        below 1e-38 becomes zero. Clipped before, as `print(clipper.plan)` tells: the gradients of
        subclasses, of optimizers whose groups are not all fused, that step several parameter groups
        of the clipper or what it does not hold, limits per tensor, unit or element, gradients
        outside of `.grad`, on_nonfinite="zero". On an accelerator without loss scale and `scale`
        all are: given a number, these kernels write all gradients, and nobody waits to know that it
        is 1. Where parameters lie on a CPU, and the norm on an accelerator (CPU offload), the
        number is waited for.

        Where the norm is not finite, a scaler skips the step, and so does on_nonfinite="skip", and
        any step that a policy vetoes: in the kernels of optimizers with `fused=True`, else on the
        host, which waits for the norm.

        A wrapper is stepped by its own `step()`, after `clip_`. One that holds the scaler, as
        accelerate's does, steps and updates it there; while accelerate accumulates gradients, a
        call is an error. An optimizer that the clipper is attached to is an error as well.

        Args:
            closure: as `optimizer.step` has it. The gradients of each evaluation are clipped.

        Other args, Raises, Collective: as `clip_`.
        """
        grad_scaler.check_scaler(scaler)
        check_function("closure", closure, "a function that computes the loss and its gradients")
        stepped = wrappers.list_optimizers(optimizer)
        optimizers.check_steps(stepped, closure)
        self._calls.check_steps(stepped)
        if closure is not None:
            if loss is not None:
                raise ValueError(
                    "cannot judge a step by loss= and take a closure, which computes losses of its "
                    "own. Leave one out."
                )
            return self._calls.step_closure(stepped, scaler, scale, closure, step)
        decision = self.decide(stepped, scaler, scale, step, loss)
        with torch.no_grad():
            skip = decision.skip(grad_scaler.is_on(scaler))
            factors = folding.factors(stepped, decision)
            decision.apply_without(folding.stepped_by(stepped, factors))
        self._calls.note_steps(stepped)
        found_inf = decision.found_inf if grad_scaler.is_on(scaler) else None
        for each in stepped:
            if optimizers.multiplies(each):
                with optimizers.folded(each, factors.get(id(each)), skip):
                    grad_scaler.step_optimizer(each, scaler, found_inf)
            elif skip is None or grad_scaler.is_on(scaler) or not decision.is_left_out:
                grad_scaler.step_optimizer(each, scaler, found_inf)
        return decision.report

    @outside_of_graphs
    def attach(self, optimizer: Optimizers, scaler: GradScaler | None = None) -> AttachedClipper:
        """Clips whenever `optimizer.step()` runs, for loops that are not yours.

        `.remove()` of what is returned ends it; `.report` is that of the latest step.

        Several optimizers, given together or one after the other, share one norm: the first that
        steps measures the gradients of all, and the others clip theirs with the same coefficient,
        unless their gradients have changed since or one of them steps again, which begins anew. If
        they are scaled, pass the scaler with each of them. What wraps optimizers is seen through;
        where a wrapper does work of its own, as schedule-free's does, its own step clips.

        It does what `step` does, also under `GradScaler.step` with fused optimizers, whose
        gradients are then still scaled. Pass the scaler as well where an overflow on one rank may
        be invisible to others (several meshes, pipelines, plain experts): all ranks then skip and
        halve the scale. With optimizers that are not fused a scaler decides before the step runs,
        and ranks of which only some skip would wait for each other: use `step`.

        Raises:
            ValueError: the clipper is attached to the optimizer already; a wrapper that steps other
                tensors than the clipper holds; in a step, see `clip_`.
            TypeError: something that is no optimizer.

        Collective: in each step, as `clip_`; all ranks must step. Of several optimizers those that
            do not measure agree that theirs are unchanged: one more all-reduce of one number, which
            an accelerator is waited for.
        """
        grad_scaler.check_scaler(scaler)
        given = wrappers.list_optimizers(optimizer)
        check_attached(given, optimizer)
        calls = self._calls
        calls.check_not_in_backward()
        for each in given:
            calls.check_wrapped(each)
        for each in wrappers.unwrapped(given):  # before it gets others
            self._held.new_params([each], scaled=False)
        attached = [each.optimizer for each in calls.rounds.members()]
        calls.note_steps([*attached, *wrappers.unwrapped(given)])
        return AttachedClipper(given, scaler, calls.decide, calls.rounds)

    @outside_of_graphs
    def attach_in_backward(self, optimizers: Optimizers) -> BackwardClipper:
        """Clips in each `optimizer.step()` that a hook of backward calls.

        For loops in which each parameter has an optimizer, or several share one, that steps as soon
        as the gradient is accumulated and then frees it, so that the gradients of the model never
        exist together: `_apply_optimizer_in_backward` of torch.distributed.optim, or hooks by
        `param.register_post_accumulate_grad_hook`. Call `.end_step()` of what is returned after
        each backward, on every rank, in the place of `clip_` or `step`; `.remove()` ends it.

        Limits per tensor, unit or element are those of `step`: each tensor is clipped before its
        optimizer steps. In `AdaGC`'s warm-up, which limits by the norm of the whole model, and for
        `context.total_norm` of policies of your own, that norm is the larger one of the step before
        and of the tensors that step together.

        Limits for the whole model come one step late: nobody knows the norm of the model while its
        first tensors step. All are multiplied by min(1, limit / norm) of the last step with a
        finite norm above 0, so that a norm n after one of m is clipped to at most limit * n / m,
        or n. The first step is not clipped. Save `attached.state_dict()` beside the Clipper's.

        on_nonfinite: "propagate" as always. "zero" sets the tensors to zero whose gradient is not
        finite (with those that one optimizer steps together), and the others step; where parts of
        the model are sharded, it needs limits per tensor or unit. "raise" does the same, and raises
        in `end_step`. "skip" is an error: other tensors have stepped. A norm that is not finite
        sets no coefficient.

        Served are plain parameters, DDP over `_apply_optimizer_in_backward` that was called before
        DDP's first forward, and DTensors, as FSDP2 shards them. With limits per tensor each hook of
        a tensor that ranks share makes an all-reduce: the ranks must step these in one order,
        as FSDP2 and tensor parallelism do, which communicate for each of them in that order
        themselves. Another order is an error, as for `clip_`.

        Args:
            optimizers: all that step the Clipper's parameters that train. For a part of the model,
                make a Clipper of that part.

        Raises:
            ValueError: a parameter that trains has no optimizer, or two; the Clipper has
                `overlap=True`, `gradient=`, on_nonfinite="skip", a policy that vetoes steps, such
                as `SkipSpike`, or raises the norm of the model, such as `AGGC`, or is attached
                already; DDP would reduce after the hook. In a step: an optimizer steps twice before
                `end_step`, with a closure, or by a GradScaler.
            LayoutError: FSDP1's parameters; limits per tensor that ranks share under pipeline
                stages or `layouts=`.
            TypeError: something that is no optimizer.

        Collective: in hooks as above; `end_step` as `clip_`.

        Example:
            >>> import torch, distclip
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
            >>> def step(param):
            ...     optimizers[param].step()
            ...     param.grad = None
            >>> for param in model.parameters():
            ...     _ = param.register_post_accumulate_grad_hook(step)
            >>> clipper = distclip.Clipper(model, distclip.ClipTensorNorm(1.0))
            >>> attached = clipper.attach_in_backward(optimizers.values())
            >>> before = model.weight.detach().clone()
            >>> (100 * model(torch.tensor([3.0, 4.0]))).sum().backward()  # a gradient of 300, 400
            >>> round(attached.end_step().norms["all"].item())
            510
            >>> round((before - model.weight).norm().item(), 4)
            0.1
        """
        given = wrappers.list_optimizers(optimizers)
        stepped = wrappers.unwrapped(given)
        check_attached(stepped, optimizers)
        self._calls.check_not_in_backward()
        return BackwardClipper(stepped, self._calls)

    @kept_between_calls
    def state_dict(self) -> dict[str, Any]:
        """What the policies remember: tensors and numbers under names.

        The names are those of parameter groups, policies and parameters.
        The same on every rank (of a pipeline stage), however many ranks share the model.

        Raises:
            ValueError: a policy of your own remembers a number for each unit, and the model is
                sharded. Where it is not, these are saved in the order of the parameters, without
                names.
        """
        return state_dict.to_dict(self._held.group_states())

    @kept_between_calls
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on any number of ranks.

        Raises:
            ValueError: a state of another version, another policy or other parameters, or a
                number in it that cannot be one of the policy's. Nothing is loaded then.
            TypeError: `saved` is no dictionary.
        """
        held = self._held
        held.states = state_dict.from_dict(held.initial_group_states(), saved)
