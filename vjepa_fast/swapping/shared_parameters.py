"""Builds our networks over the parameters of foreign live modules.

`swap` leaves a module's tree as it is: its children go on holding the parameters, so that names, order, optimizers,
hooks of data parallelism and checkpoints see nothing new. It puts a class of ours before the module's own
(`fast_class`), whose forward runs one of our networks, a view, that holds the very same Parameter objects. A call that
our network cannot serve (an argument we do not have, a hook on a child) goes to the module's own forward: slower, never
different.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.messages import explain
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.masking.batch import Grid, MaskBatch
from vjepa_fast.models.layers import Block, set_compiled
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.ops.layer_norm import add_layer_norm, layer_norm

_SPARE_FRAMES = 64

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Autocasting(nn.Module):
    """Computes in the dtype that autocast asks for, where it is on."""

    compute: torch.dtype = torch.float32
    keeps_norm: bool = False
    """The last norm returns fp32, as it does under autocast on a GPU."""

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    def casting(self, device: torch.device) -> torch.autocast:
        """The context to run in, on inputs of this device: no autocast, as the network casts for itself."""
        parameter = next(self.parameters())
        self.compute, self.keeps_norm = parameter.dtype, False
        if torch.is_autocast_enabled(device.type) and parameter.dtype != torch.float64:
            self.compute = torch.get_autocast_dtype(device.type)
            self.keeps_norm = device.type == "cuda"
        return torch.autocast(device.type, enabled=False)


class EncoderView(_Autocasting, VisionTransformer):
    """Our encoder over the parameters of another."""

    def _norm(self, index: int, x: Tensor, branch: Tensor | None) -> Tensor:
        if not self.keeps_norm:
            return super()._norm(index, x, branch)
        norm = self._norm_after(index)
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        if branch is None:
            return layer_norm(x, weight, bias, eps, torch.float32)
        return add_layer_norm(x, branch, weight, bias, eps, torch.float32)[1]


class PredictorView(_Autocasting, Predictor):
    """Our predictor over the parameters of another."""


_PLAIN = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Conv3d, nn.ParameterList)


def is_plain(module: nn.Module) -> bool:
    """Whether a module that holds parameters is torch's own, which computes with them what ours does."""
    return type(module) in _PLAIN


def config_of(module: nn.Module, **fields: Any) -> ModelConfig:
    """The config of the network that takes the place of a module.

    Raises:
        UserError: there is none with these fields.
    """
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise UserError(f"swap: {explain(error, class_of(module).__name__, {})}; leave it out of the call") from error


class View:
    """One of our networks and the module whose parameters it uses.

    Args:
        owner: a module of theirs; its leaves hold the parameters.
        network: ours, on the meta device.
        names: the path of each module of ours that has parameters, and that of its counterpart in `owner`. None: the
            same paths.

    Raises:
        UserError: parameters that do not correspond to ours.
    """

    def __init__(self, owner: nn.Module, network: EncoderView | PredictorView, names: dict[str, str] | None) -> None:
        self.network = network
        self.inner = [(name, module) for name, module in owner.named_modules() if name]
        self.children = [(module._modules, list(module._modules.values())) for module in owner.modules()]
        own = {name: module for name, module in network.named_modules() if module._parameters}
        theirs = {name: module for name, module in owner.named_modules() if module._parameters}
        if names is not None:
            theirs = {mine: owner.get_submodule(other) for mine, other in names.items()}
        self.pairs = [(module._parameters, theirs[name]) for name, module in own.items() if name in theirs]
        wrong = sorted({*own} ^ {*theirs})
        wrong += [name for name in own if name in theirs and {*own[name]._parameters} != {*theirs[name]._parameters}]
        wrong += [name for name, module in theirs.items() if name and not is_plain(module)]
        wrong += [name for name, _ in owner.named_buffers()]
        if wrong:
            raise UserError(
                f"swap: {class_of(owner).__name__} has other parameters than the reference's, see "
                f"{', '.join(name or 'its own' for name in wrong[:3])}; swap before anything is added"
            )
        for name, module in own.items():
            if isinstance(module, nn.LayerNorm):
                norm = theirs[name]
                if norm.weight is None or norm.bias is None:
                    raise UserError(f"swap: {name} of {class_of(owner).__name__} has no weight or bias; expected both")
                assert isinstance(norm, nn.LayerNorm)
                module.eps = norm.eps
        self.blocks = [module for module in network.modules() if isinstance(module, Block)]
        self.compiled = False

    def is_current(self) -> bool:
        """Whether the owner's tree is what it was."""
        return all(list(now.values()) == then for now, then in self.children)

    def watched(self, inactive: Callable[[Any], bool]) -> str | None:
        """The name of a child that somebody looks at, or whose forward was replaced.

        Args:
            inactive: tells a hook that does nothing now.
        """
        for name, module in self.inner:
            for kind in _HOOKS:
                hooks = getattr(module, kind)
                if hooks and not all(inactive(hook) for hook in hooks.values()):
                    return name
            if "forward" in vars(module):
                return name
        return None

    def refresh(self, blocks: Iterable[nn.Module], checkpointing: bool, compiled: bool) -> None:
        """Take over what has changed in the owner.

        Args:
            blocks: of the owner, for their training flags.
            checkpointing: recompute blocks in the backward.
            compiled: compile the parts of the blocks.
        """
        for own, theirs in self.pairs:
            own.update(theirs._parameters)
        for block, other in zip(self.blocks, blocks, strict=True):
            block.training = other.training
        self.network.cfg.use_activation_checkpointing = checkpointing
        if compiled != self.compiled:
            set_compiled(self.network, compiled)
            self.compiled = compiled


class Fast(nn.Module):
    """What all classes have that `swap` puts before those of others."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if not key.startswith("_vf_")}

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        return _empty, (mixin, base), self.__getstate__()


class FastNetwork(Fast):
    """Base of swapped modules that have a view: encoders and predictors."""

    def make_view(self) -> View:
        """A new view of this module.

        Raises:
            UserError: it has something that our networks lack.
        """
        raise NotImplementedError

    def serves(self) -> View | None:
        """The view, fit to be used; None, with a warning: the module's own forward has to run."""
        view: View | None = vars(self).get("_vf_view")
        try:
            if view is None or not view.is_current():
                view = self.make_view()
                object.__setattr__(self, "_vf_view", view)
        except UserError as error:
            self._warn(str(error))
            return None
        name = view.watched(self.is_inactive)
        if name is not None or nn.modules.module._has_any_global_hook():
            self._warn(f"there is a hook or another forward on {name or 'all modules'}")
            return None
        return view

    @staticmethod
    def is_inactive(hook: Any) -> bool:
        """Whether a hook on a child does nothing at the moment."""
        return False

    def _warn(self, why: str) -> None:
        if "_vf_warned" not in vars(self):
            object.__setattr__(self, "_vf_warned", True)
            warnings.warn(f"{type(self).__name__} runs its own modules, not vjepa-fast's: {why}", stacklevel=3)


def _empty(mixin: type[Fast], base: type[nn.Module]) -> nn.Module:
    cls = fast_class(mixin, base)
    return cls.__new__(cls)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The foreign class of a module, also after it has been swapped."""
    return type(module).__bases__[1] if isinstance(module, Fast) else type(module)


_classes: dict[tuple[type[Fast], type[nn.Module]], type[nn.Module]] = {}


def fast_class(mixin: type[Fast], base: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class `base` after `swap`. It is made here and has no place of its own; pickles name its
    two parents."""
    if (mixin, base) not in _classes:
        _classes[mixin, base] = type(f"Fast{base.__name__}", (mixin, base), {"__module__": __name__})
    return _classes[mixin, base]


def make_fast(module: nn.Module, mixin: type[Fast]) -> None:
    """Change the class of a live module.

    Raises:
        UserError: it has something that our networks lack.
    """
    before = type(module)
    module.__class__ = fast_class(mixin, before)
    try:
        if isinstance(module, FastNetwork):
            object.__setattr__(module, "_vf_view", module.make_view())
    except UserError:
        module.__class__ = before
        raise


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, or another forward than its class."""
    return "forward" in vars(module) or any(getattr(module, kind) for kind in _HOOKS)


def same_tensors(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules with the very same parameters, buffers and hooks."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo |= {id(hook): hook for hook in value.values()}
    made = copy.deepcopy(module, memo)
    for new, old in zip(made.modules(), module.modules(), strict=True):
        if old._compiled_call_impl is not None:
            new.compile()
    return made


def square_grid(ids: Sequence[Tensor], num_tokens: int, side: int) -> Grid:
    """What ids of a predictor with RoPE are counted on: frames of side^2 tokens, as many as are needed.

    On a GPU nobody asks the device which ids there are: they are _SPARE_FRAMES times those of a clip. A frame that no
    token has costs a row of a small table.

    Args:
        ids: integer tensors on one device.
        num_tokens: of a clip.
        side: rows and columns of a frame.
    """
    square = side * side
    if ids[0].device.type == "cuda":
        return _SPARE_FRAMES * -(-num_tokens // square), side, side
    return max((int(part.max()) for part in ids if part.numel()), default=0) // square + 1, side, side


def _check_ids(ids: Tensor, num_tokens: int) -> None:
    """Complain of ids outside 0 .. num_tokens - 1; on a GPU without waiting for it."""
    if not ids.numel():
        return
    if ids.device.type == "cuda":
        torch._assert_async((ids >= 0).all() & (ids < num_tokens).all(), "a mask holds ids outside the clip")
    elif int(ids.min()) < 0 or int(ids.max()) >= num_tokens:
        raise ValueError(f"a mask holds ids {int(ids.min())} to {int(ids.max())}; expected 0 to {num_tokens - 1}")


def pack(context: Sequence[Tensor], target: Sequence[Tensor] | None, grid: Grid) -> MaskBatch:
    """Index lists of the reference, int64 [B, K] a mask, as one MaskBatch; `target` None: without targets.

    Raises:
        ValueError: ids outside the grid.
    """
    batch_size = len(context[0])
    lists = [list(context), [ids.new_empty(batch_size, 0) for ids in context] if target is None else list(target)]
    joined = [torch.cat([ids.reshape(-1) for ids in part]) for part in lists]
    for ids in joined:
        _check_ids(ids, grid[0] * grid[1] * grid[2])
    lengths = [tuple(ids.shape[1] for ids in part for _ in range(batch_size)) for part in lists]
    return MaskBatch(
        grid=grid,
        num_masks=len(context),
        batch_size=batch_size,
        context_ids=joined[0].to(torch.int32),
        target_ids=joined[1].to(torch.int32),
        context_lengths=lengths[0],
        target_lengths=lengths[1],
    )


def unpack(packed: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[sum of B * K, D] as one [B, K, D] for each (B, K)."""
    parts = packed.split([rows * length for rows, length in shapes])
    return [part.view(*shape, packed.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]
