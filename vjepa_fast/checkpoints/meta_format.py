"""Reads and writes checkpoints in the layout of facebookresearch/vjepa2 (app/vjepa/train.py:331-345).

Keys: encoder, predictor, target_encoder (state dicts with the prefix `module.backbone.`), opt, scaler, epoch, loss,
batch_size, world_size, lr. Ours add one key, `vjepa_fast`, which the reference ignores.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vjepa_fast.checkpoints import infer_config
from vjepa_fast.common.errors import UserError
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.optim.adamw_ema import AdamWEMA

PREFIX = "module.backbone."
STRIPPED = ("_orig_mod.", "module.", "backbone.")
NETWORKS = ("encoder", "predictor", "target_encoder")
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors of the optimizer's state that are as large as their parameter."""


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that data parallelism, wrappers and compilation add."""
    stripped = {}
    for key, value in state.items():
        while key.startswith(STRIPPED):
            key = key[key.index(".") + 1 :]
        stripped[key] = value
    return stripped


def read(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU.

    Args:
        path: file.
        mmap: leave tensors in the file until they are touched, so that those nobody wants cost no memory.

    Raises:
        UserError: no such file, not a checkpoint, truncated, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} " + ("is not a file" if path.exists() else "does not exist"))
    try:
        # Files of torch before 1.6 are not zip archives and cannot be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own text advises to load the file with code and all.
        found = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))
        what = f" (it asks for {found.group(1)})" if found else ""
        raise UserError(
            f"checkpoint {path} is no checkpoint, or holds more than tensors and plain values{what}; "
            "nothing in it was run"
        ) from error
    except Exception as error:
        # A damaged file makes the reader fail in any way; there is nothing else here that could.
        raise UserError(f"checkpoint {path} cannot be read: it is truncated, damaged or no checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}; expected a dictionary")
    return checkpoint


def load_network(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Strict load of one network from a state dict with or without prefixes.

    Raises:
        UserError: names what is missing, unexpected or of another shape.
    """
    state = strip_prefixes(state)
    own = module.state_dict()
    for table in infer_config.UNREAD_TABLES:
        if table in state and table not in own:
            # Released rope checkpoints carry position tables that nothing reads.
            state.pop(table)
    if differences := infer_config.differences(own, state):
        raise UserError(f"the {what} in the checkpoint does not fit the configured model: {differences}")
    if any(hasattr(tensor, "device_mesh") for tensor in own.values()):
        from vjepa_fast.optim.dtensors import cut_like

        state = {key: cut_like(own[key], value) for key, value in state.items()}
    module.load_state_dict(state)


def load_checkpoint(
    path: str | Path,
    model: VJEPA,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any]:
    """Load a checkpoint of the reference or of ours into a model.

    Args:
        path: file.
        model: filled strictly: encoder, predictor and target encoder.
        optimizer: filled from `opt` if given; keeps its own choice of implementation (fused or not).
        scaler: filled if given and if the checkpoint has a scaler state.

    Returns:
        The other entries: epoch, loss, batch_size, world_size, lr, and `vjepa_fast` where there is one.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    # Of shards only a part is read.
    mmap = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return load_contents(read(path, mmap=mmap), path, model, optimizer, scaler)


def load_contents(
    checkpoint: dict[str, Any],
    path: str | Path,
    model: VJEPA,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any]:
    """As load_checkpoint, of the contents of a file.

    Args:
        checkpoint: what was read; its tensors are taken out.
        path: for messages.
    """
    needed = (*NETWORKS, "epoch", *(("opt",) if optimizer is not None else ()))
    missing = [key for key in needed if key not in checkpoint]
    if missing:
        raise UserError(f"checkpoint {path} has no {', '.join(missing)}; it has {shorten(map(str, checkpoint))}")
    odd = [key for key in NETWORKS if not isinstance(checkpoint[key], dict)]
    if odd or not isinstance(checkpoint["epoch"], int):
        raise UserError(
            f"checkpoint {path}: {(odd or ['epoch'])[0]} is not what the reference or vjepa-fast writes there"
        )
    networks = {key: checkpoint.pop(key) for key in NETWORKS}
    for key, state in networks.items():
        try:
            load_network(getattr(model, key), state, key)
        except UserError as error:
            fits = infer_config.fitting(*(strip_prefixes(networks[name]) for name in ("encoder", "predictor")))
            raise UserError(f"{error}" + (f". A config that fits it has {fits}" if fits else "")) from None
    state = checkpoint.pop("opt", None)
    if optimizer is not None:
        _load_optimizer(optimizer, state, path)
    state = checkpoint.pop("scaler", None)
    if scaler is not None and state:
        try:
            scaler.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"checkpoint {path}: the scaler state is damaged ({error})") from error
    return checkpoint


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, path: str | Path) -> None:
    own = [{key: group.get(key) for key in ("fused", "foreach", "capturable")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {path}: the optimizer state does not fit the configured model ({error})"
        ) from error
    # Ours has looked for itself, and may have kept parts.
    own_kind = isinstance(optimizer, AdamWEMA)
    for group, choice in zip(optimizer.param_groups, own, strict=True):
        group.update(choice)
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape and not own_kind:
                    raise UserError(
                        f"checkpoint {path}: the optimizer state does not fit the configured model ({name} "
                        f"is {list(value.shape)} for a parameter of {list(parameter.shape)})"
                    )
            state = optimizer.state.get(parameter, {})
            if group.get("fused") and "step" in state:
                # torch places the step count by the saved choice; the fused kernel wants it beside the parameter.
                state["step"] = state["step"].to(parameter.device, torch.float32)


def shorten(names: Iterable[str], limit: int = 12) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def to_checkpoint(
    model: VJEPA,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    loss: float,
    batch_size: int,
    world_size: int,
    lr: float,
    scaler: torch.amp.GradScaler | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A dictionary in the reference's layout; `extra` goes under the key `vjepa_fast`.

    Args:
        epoch: finished epochs.
        batch_size: clips per process.
    """
    opt = optimizer.state_dict()
    # The schedule sets the momentum at every step; the reference's groups have no such entry.
    opt["param_groups"] = [
        {key: None if key in ("fused", "foreach") else value for key, value in group.items() if key != "ema_momentum"}
        for group in opt["param_groups"]
    ]
    if scaler is not None:
        scaler_state: dict[str, Any] | None = scaler.state_dict()
    elif model.cfg.dtype == "bfloat16":
        # The reference keeps a scaler with bf16 as well and wants its state back; these are its starting values.
        scaler_state = {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        }
    else:
        scaler_state = None
    networks = {
        key: {PREFIX + name: _by_itself(value) for name, value in getattr(model, key).state_dict().items()}
        for key in NETWORKS
    }
    return {
        **networks,
        "opt": opt,
        "scaler": scaler_state,
        "epoch": epoch,
        "loss": loss,
        "batch_size": batch_size,
        "world_size": world_size,
        "lr": lr,
        **({"vjepa_fast": extra} if extra is not None else {}),
    }


def _by_itself(x: Tensor) -> Tensor:
    """A tensor that does not keep others alive, and in a file: those of its storage."""
    if isinstance(x, DTensor) or x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x
    return x.to("cpu", copy=True)


def save_checkpoint(path: str | Path, model: VJEPA, optimizer: torch.optim.Optimizer, **entries: Any) -> None:
    """Write a checkpoint that appears whole or not at all; `entries` as to_checkpoint."""
    from vjepa_fast.checkpoints.atomic_save import write_atomically

    write_atomically(Path(path), to_checkpoint(model, optimizer, **entries))
