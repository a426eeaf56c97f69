"""AdamW that also updates the target encoder and the half-precision shadows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.vit import COMPUTE_DTYPES
from vjepa_fast.ops.adamw_ema import Operands, adamw_ema_, adamw_ema_ref, kernels_fit
from vjepa_fast.ops.ema import ema_
from vjepa_fast.ops.grad_norm import sum_of_squares
from vjepa_fast.ops.linear import Linear, mark_shadow_fresh
from vjepa_fast.ops.triton_support.dispatch import is_capturing, use_triton
from vjepa_fast.optim.dtensors import Shards, cut_like, local_of, place_of, shards_of
from vjepa_fast.optim.group_values import DeviceValues, host_values
from vjepa_fast.optim.step_plan import StepPlan


def parameter_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict[str, Any]]:
    """The reference's four groups, in its order, so that its optimizer state fits.

    Encoder weights, predictor weights, then without decay the biases and vectors of both (facebookresearch/vjepa2,
    app/vjepa/utils.py:227-241). Frozen position tables are listed too, as there.
    """

    def select(module: nn.Module, decayed: bool) -> list[nn.Parameter]:
        return [p for name, p in module.named_parameters() if (("bias" in name) or p.ndim == 1) != decayed]

    undecayed = {"WD_exclude": True, "weight_decay": 0}
    return [
        {"params": select(encoder, True)},
        {"params": select(predictor, True)},
        {"params": select(encoder, False), **undecayed},
        {"params": select(predictor, False), **undecayed},
    ]


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * source, over all parameters, in their own precision.

    Args:
        target, source: of the same parameters; DTensors, if sharded, in the same way.
        momentum: share of the target that is kept, 0 to 1.

    Raises:
        ValueError: parameters of different shapes or in different numbers.
    """
    pairs = zip(target.parameters(), source.parameters(), strict=True)
    moved, followed = zip(*((local_of(k), local_of(q)) for k, q in pairs), strict=True)
    ema_(moved, followed, momentum)


class AdamWEMA(torch.optim.AdamW):
    """AdamW on encoder and predictor whose steps also move the target encoder and refresh half-precision shadows.

    A step whose gradients are not finite leaves weights, moments and step counts as they are, but the target encoder
    still moves. Parameters without a gradient are left alone. The state is that of torch.optim.AdamW, and each
    parameter group holds one value more, `ema_momentum`, that may be changed between steps like `lr`.

    With `clip_norm` a step first scales the gradients of the encoder, and those of the predictor, to that norm where
    theirs is larger, as torch.nn.utils.clip_grad_norm_ does for each of them.

    On a GPU the values of the groups are copied to the device at each step, so a captured CUDA graph sees new ones:
    call `write_group_values` before each replay.

    Args:
        model: the VJEPA whose parameters are trained. Parameters may be DTensors; then the shards are updated where
            they lie, the norm is of all shards, and there are no shadows.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; biases and vectors are not decayed.
        ema_momentum: share of the target encoder that a step keeps, 0 to 1.
        clip_norm: largest norm of the gradients of each network; None: they are not clipped. The attribute of this name
            may be changed between steps, for a captured graph from one number to another only, such as infinity.

    Raises:
        ValueError: a value out of range, or a target encoder whose shards differ from the encoder's.
    """

    # torch.amp.GradScaler then sets the attributes grad_scale and found_inf for the duration of a step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: VJEPA,
        lr: float | Tensor = 5.25e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.04,
        ema_momentum: float = 0.99925,
        clip_norm: float | None = None,
    ) -> None:
        if not 0.0 <= ema_momentum <= 1.0:
            raise ValueError(f"ema_momentum is {ema_momentum}; expected 0 to 1")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm is {clip_norm}; expected a positive number, or None")
        groups = parameter_groups(model.encoder, model.predictor)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for values in (self.defaults, *self.param_groups):
            values["ema_momentum"] = ema_momentum
        self.model = model
        self.clip_norm = clip_norm
        self.grad_norm: Tensor | None = None
        """Scalar: norm of all gradients of the last step, before clipping."""
        self.part_norms: Tensor | None = None
        """[2]: of the encoder's gradients and of the predictor's, likewise."""
        self.skipped: Tensor | None = None
        """Scalar: 1 where the last step left the weights as they were, else 0."""
        self.veto: Tensor | None = None
        """Bool scalar on the device: leave the weights as they are, as if gradients were not finite."""
        self._targets = dict(zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True))
        self._plan: StepPlan | None = None
        self._on_device = DeviceValues()
        self._shadows: dict[Tensor, Tensor] = {}
        self._dtype = COMPUTE_DTYPES[model.cfg.dtype]
        layers = [m for m in model.modules() if isinstance(m, Linear)] if self._dtype != torch.float32 else []
        self._shadowed: set[Tensor] = {p for layer in layers for p in layer.parameters() if not isinstance(p, DTensor)}
        for parameter, target in self._targets.items():
            if local_of(parameter).shape != local_of(target).shape:
                raise ValueError(
                    f"a parameter of the encoder has the local shape {list(local_of(parameter).shape)}, "
                    f"that of the target encoder {list(local_of(target).shape)}; shard both alike"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of weights, target encoder and shadows.

        Sets `grad_norm`, `part_norms` and `skipped`, which stay on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan_of_step()
        operands = plan.operands
        fit = plan.fits and all(grad is None or grad.dtype == torch.float32 for grad in operands.grads)
        by_kernels = fit and use_triton(operands.params[0])
        if by_kernels and not is_capturing(operands.params[0].device):
            self.write_group_values()
        self._unscale(operands)
        # The kernels' values are on the device, where a replayed graph finds those of its own step.
        limit = self._on_device.clip_norm if by_kernels else self.clip_norm
        parts = [
            self._sum_of_squares([operands.grads[i] for i in part], [plan.shards[i] for i in part])
            for part in plan.parts
        ]
        if self.clip_norm is not None:
            assert limit is not None
            plan.clip(parts, limit)
        total = parts[0] + parts[1]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            total = torch.where(found_inf > 0, torch.nan, total)
        self.grad_norm, self.part_norms = total.sqrt(), torch.stack(parts).sqrt()
        if self.veto is not None:
            total = torch.where(self.veto, torch.nan, total)
        if by_kernels:
            assert self._on_device.groups is not None
            adamw_ema_(operands, self._on_device.groups, total.float())
        elif is_capturing(operands.params[0].device):
            raise RuntimeError("a step of AdamWEMA is captured by its kernels only, which take float32 on CUDA tensors")
        else:
            adamw_ema_ref(operands, host_values(self.param_groups), total)
        self.skipped = (~torch.isfinite(total)).float()
        # Only what this step has written: a parameter without a gradient may have changed since its shadow was.
        for masters, shadows in ((operands.params, operands.shadows), (operands.targets, operands.target_shadows)):
            for master, shadow in zip(masters, shadows, strict=True):
                if shadow is not None:
                    mark_shadow_fresh(master, shadow)  # type: ignore[arg-type]
        # Kept for the next step, they would be in memory beside its own.
        operands.grads = []
        return loss

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process updates a parameter."""
        return True

    def no_sync(self) -> AbstractContextManager[None]:
        """For backwards whose gradients are not exchanged yet, where the optimizer does that. Here it does not."""
        return nullcontext()

    def flush(self) -> None:
        """Send the gradients that are still here, where the optimizer exchanges them. To be called before anything else
        is exchanged between a backward and the step: processes differ in what they have sent by then."""

    def refresh(self) -> None:
        """Bring the weights up to date, and wait for it; all processes call it. Here they are always."""

    def collect(self) -> None:
        """Make `state_dict` whole on the first process, and `refresh`; all processes call it."""

    @property
    def layout(self) -> object:
        """Another object after a step that has found parameters, targets or moments elsewhere, or others of them."""
        return self._plan

    @torch.no_grad()
    def write_shadows(self) -> None:
        """Make the half-precision copies anew, where parameters were written to by somebody else.

        A step does without: what it multiplies with are these copies or, where they are out of date, fresh ones. A
        captured CUDA graph multiplies with these copies, whatever they hold.
        """
        for master, shadow in self._shadows.items():
            shadow.copy_(master)
            mark_shadow_fresh(master, shadow)

    def init_state(self) -> None:
        """Make the moments of all parameters that can have a gradient.

        torch.distributed.checkpoint.state_dict takes a step of learning rate 0 to fill an empty state, which would move
        the target encoder; it takes none where there is a state.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and self.owns(parameter):
                    self._state_of(parameter)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an AdamWEMA holds the model whose target encoder it moves, so it is neither copied nor "
            "pickled; make one for the copied model and load this one's state_dict()"
        )

    def write_group_values(self) -> None:
        """Copy lr, betas, eps, weight decay and momentum of the groups, and the norm to clip to, to the device, without
        waiting for it."""
        device = local_of(self.param_groups[0]["params"][0]).device
        self._on_device.write(self.param_groups, self.clip_norm, device)

    def _plan_of_step(self) -> StepPlan:
        """The lists of the next step: as before, with the new gradients, unless something else has changed."""
        if self._plan is None or self._plan.signature != self._signature():
            self._plan = self._make_plan()
            # Making it makes moments too.
            self._plan.signature = self._signature()
        self._plan.operands.grads = [self._grad_of(parameter) for parameter in self._plan.parameters]
        return self._plan

    def _signature(self) -> list[Any]:
        signature: list[Any] = [len(group["params"]) for group in self.param_groups]
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            state, target = self.state.get(parameter, {}), self._targets.get(parameter)
            signature += (
                self._has_grad(parameter),
                place_of(parameter),
                id(state.get("exp_avg")),
                id(state.get("exp_avg_sq")),
                None if target is None else place_of(target),
            )
        return signature

    def _make_plan(self) -> StepPlan:
        operands, parameters = Operands(), []
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                target = self._targets.get(parameter)
                has_grad = self._has_grad(parameter)
                if not self.owns(parameter) or (not has_grad and target is None):
                    continue
                parameters.append(parameter)
                state = self._state_of(parameter) if has_grad else {}
                operands.groups.append(number)
                operands.params.append(self._part(parameter, parameter))
                operands.exp_avgs.append(local_of(state["exp_avg"]) if state else None)
                operands.exp_avg_sqs.append(local_of(state["exp_avg_sq"]) if state else None)
                operands.steps.append(local_of(state["step"]) if state else None)
                copies = self._shadow(parameter), None if target is None else self._shadow(target)
                operands.targets.append(None if target is None else self._part(target, parameter))
                for column, copy in zip((operands.shadows, operands.target_shadows), copies, strict=True):
                    column.append(None if copy is None else self._part(copy, parameter))
        operands.grads = [None] * len(parameters)
        encoder, predictor = (
            [i for i, p in enumerate(parameters) if (p in self._targets) == wanted] for wanted in (True, False)
        )
        return StepPlan(
            [], parameters, [shards_of(p) for p in parameters], operands, (encoder, predictor), kernels_fit(operands)
        )

    def _unscale(self, operands: Operands) -> None:
        """Divide the gradients by the scale of a scaler that leaves this to the optimizer."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        grads = [grad for grad in operands.grads if grad is not None]
        if grad_scale is not None and grads:
            torch._foreach_mul_(grads, grad_scale.reciprocal())

    def _sum_of_squares(self, gradients: Sequence[Tensor | None], shards: Sequence[Shards]) -> Tensor:
        """Over all these gradients and all their shards, a scalar on the device."""
        parts: dict[Shards, list[Tensor]] = {}
        for grad, key in zip(gradients, shards, strict=True):
            if grad is not None:
                parts.setdefault(key, []).append(grad)
        total = torch.zeros((), device=local_of(self.param_groups[0]["params"][0]).device)
        for (mesh, dims), grads in parts.items():
            part = sum_of_squares(grads)
            for dim in dims:
                assert mesh is not None
                dist.all_reduce(part, group=mesh.get_group(dim))
            total = total + part
        return total

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local_of(parameter).device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _part(self, x: Tensor, parameter: Tensor) -> Tensor:
        """What this process updates of a parameter it owns, or of a tensor like it: its target, a copy, a moment."""
        return local_of(x)

    def _has_grad(self, parameter: Tensor) -> bool:
        return parameter.grad is not None

    def _grad_of(self, parameter: Tensor) -> Tensor | None:
        """The gradient of this process's part of a parameter; None where there is none."""
        grad = parameter.grad
        if grad is None:
            return None
        if isinstance(parameter, DTensor):
            assert isinstance(grad, DTensor)
            if grad.placements != parameter.placements:
                grad = grad.redistribute(parameter.device_mesh, parameter.placements)
        grad, like = local_of(grad), local_of(parameter)
        # The kernels walk through memory, so a gradient must lie as its parameter does.
        return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)

    def _shadow(self, master: Tensor) -> Tensor | None:
        if master not in self._shadowed:
            return None
        shadow = self._shadows.get(master)
        if shadow is None or shadow.device != master.device:
            shadow = self._shadows[master] = torch.empty_like(master, dtype=self._dtype, requires_grad=False)
        return shadow

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or of torch.optim.AdamW, such as the entry `opt` of the reference's checkpoints.

        Groups without `ema_momentum` keep theirs.

        Raises:
            ValueError: groups of other sizes, moments of other shapes, or options that this class does not have
                (amsgrad, maximize).
        """
        groups = state_dict["param_groups"]
        if any(group.get(option) for group in groups for option in ("amsgrad", "maximize")):
            raise ValueError("the saved optimizer uses amsgrad or maximize; AdamWEMA has neither")
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = dict(state_dict["state"])
        # torch checks the sizes of the groups; their order is that of the parameters.
        for number, parameter in zip((n for group in groups for n in group["params"]), parameters, strict=False):
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state_dict["state"].get(number, {}).get(name)
                if moment is not None and moment.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of parameter {number} is saved with shape {list(moment.shape)}; the "
                        f"parameter has {list(parameter.shape)}"
                    )
                if moment is not None and isinstance(parameter, DTensor) and not isinstance(moment, DTensor):
                    states[number] = {**states[number], name: cut_like(parameter, moment)}
        momenta = [group["ema_momentum"] for group in self.param_groups]
        # torch places step counts by these options of the saved groups.
        own = {"fused": True, "foreach": None, "capturable": False, "differentiable": False}
        states = self._cut(states, [number for group in groups for number in group["params"]])
        super().load_state_dict({**state_dict, "state": states, "param_groups": [{**group, **own} for group in groups]})
        for group, momentum in zip(self.param_groups, momenta, strict=True):
            group.setdefault("ema_momentum", momentum)
        self._plan = None
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state.get(name)
                # A part of a parameter is flat.
                if (
                    moment is not None
                    and moment.shape == parameter.shape
                    and (local_of(moment).stride() != local_of(parameter).stride())
                ):
                    state[name] = torch.empty_like(parameter, requires_grad=False).copy_(moment)

    def _cut(self, state: dict[int, dict[str, Tensor]], numbers: list[int]) -> dict[int, dict[str, Tensor]]:
        """What this process keeps of a whole state; numbers of the parameters, in their order."""
        return state
