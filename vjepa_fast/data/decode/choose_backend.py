"""Chooses the decoder from what is configured, installed and supported by the device."""

from __future__ import annotations

import os

import torch

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.backend import Finisher, HostFinisher, HostPreparer, Preparer
from vjepa_fast.data.decode.dali import DaliPreparer, missing
from vjepa_fast.data.decode.dali_pipelines import DaliFinisher
from vjepa_fast.data.workers import available_cores


def choose(backend: str, device: torch.device) -> str:
    """`dali` or `pyav`.

    Raises:
        ConfigError: DALI is asked for and cannot be used.
    """
    if backend == "pyav" or backend == "auto" and device.type != "cuda":
        return "pyav"
    why_not = missing(device)
    if why_not is None:
        return "dali"
    if backend == "auto":
        return "pyav"
    raise ConfigError(f"data.backend is dali, but {why_not}; or set data.backend=pyav")


def make_backend(cfg: DataConfig, device: torch.device, batch_size: int) -> tuple[Preparer, Finisher]:
    """Both halves of the back end.

    Args:
        cfg: the data section.
        device: where the clips go.
        batch_size: most clips of one batch.

    Raises:
        ConfigError: DALI is asked for and cannot be used.
    """
    on_gpu = device.type == "cuda"
    if choose(cfg.backend, device) == "pyav":
        return HostPreparer(), HostFinisher(device, cfg.pin_mem, (cfg.device_prefetch or 2) if on_gpu else 1)
    num_ahead = cfg.device_prefetch or (4 if on_gpu else 2)
    share = max(1, available_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    num_threads = cfg.dali_threads or (8 if on_gpu else share)
    return DaliPreparer(on_gpu), DaliFinisher(device, cfg.crop_size, batch_size, num_ahead, num_threads, cfg.pin_mem)
