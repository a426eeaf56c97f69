"""`vjepa_fast.swap`: Meta's and Hugging Face's live modules on our networks, sharing their parameters.

What stays theirs: parameters, state_dict keys, order of parameters, signatures, outputs, and so optimizers, moving
averages, DistributedDataParallel and checkpoints. What becomes ours: the forward. docs/swap.md tells what that brings.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.common.errors import UserError
from vjepa_fast.swapping.kinds import parts
from vjepa_fast.swapping.shared_parameters import Fast, make_fast, same_tensors

_ACCEPTED = (
    "VisionTransformer and VisionTransformerPredictor of facebookresearch/jepa and facebookresearch/vjepa2, alone or "
    "in their MultiMask and MultiSeq wrappers, VJEPA2Model of Hugging Face and its encoder and predictor; all of these "
    "also compiled or in DistributedDataParallel"
)


def swap(
    encoder: nn.Module | None,
    predictor: nn.Module | None = None,
    target_encoder: nn.Module | None = None,
    *,
    inplace: bool = False,
) -> tuple[Any, Any, Any]:
    """Modules with the same signatures, outputs and Parameter objects that run on vjepa-fast's networks.

    Autocast around a call is respected: the networks then compute in its dtype.

    Args:
        encoder: of V-JEPA 1, 2 or 2.1 (docs/swap.md lists all), or a VJEPA2Model, predictor within; or None.
        predictor: likewise.
        target_encoder: likewise.
        inplace: the modules themselves are changed, so that whoever holds them runs faster. False: they stay as they
            are, and copies that share their tensors are returned. A DistributedDataParallel is always the same object
            and has another `.module` afterwards.

    Returns:
        (encoder, predictor, target_encoder), None for what was not given.

    Raises:
        UserError: a module that is not known, stands in the wrong place, or can do something that ours cannot; nothing
            has been changed then.
    """
    given = {"encoder": encoder, "predictor": predictor, "target_encoder": target_encoder}
    for place, module in given.items():
        if module is not None:
            # A copy that is thrown away tells whether all of them can be swapped.
            _swap_tree(same_tensors(_unwrapped(module, place)), place)
    swapped = [module if module is None else _swap(module, place, inplace) for place, module in given.items()]
    return swapped[0], swapped[1], swapped[2]


def _swap(module: Any, place: str, inplace: bool) -> nn.Module:
    if isinstance(module, DistributedDataParallel):
        module.module = _swap(module.module, place, inplace)
        return module
    if _is_compiled(module):
        inner = _swap(module._orig_mod, place, inplace)
        return module if inplace else type(module)(inner, module.dynamo_ctx)
    if not inplace:
        module = same_tensors(module)
    _swap_tree(module, place)
    return module


def _is_compiled(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _unwrapped(module: Any, place: str) -> nn.Module:
    while isinstance(module, DistributedDataParallel) or _is_compiled(module):
        module = module._orig_mod if _is_compiled(module) else module.module
    if not isinstance(module, nn.Module):
        raise UserError(f"swap: the {place} is a {type(module).__name__}; expected a torch.nn.Module")
    return module


def _swap_tree(module: nn.Module, place: str) -> None:
    """Change a module, and the one within a wrapper."""
    if isinstance(module, Fast):
        return
    found = parts(module)
    role = place.removeprefix("target_")
    if not found:
        raise UserError(
            f"swap: the {place} is a {type(module).__module__}.{type(module).__qualname__}, which is not "
            f"known; expected {_ACCEPTED}"
        )
    for part, part_role, mixin in found:
        if part_role != role:
            raise UserError(
                f"swap: the {place} is a {type(part).__name__}, which is {_ARTICLES[part_role]}; expected "
                f"{_ARTICLES[role]}: swap(encoder, predictor, target_encoder)"
            )
        if "forward" in vars(part):
            raise UserError(
                f"swap: the forward of the {place}'s {type(part).__name__} has been replaced; swap before that is done"
            )
        if not isinstance(part, Fast):
            make_fast(part, mixin)


_ARTICLES = {"encoder": "an encoder", "predictor": "a predictor"}
