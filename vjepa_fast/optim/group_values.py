"""The values of parameter groups, lr and so on, where kernels read them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops.adamw_ema import GROUP_VALUES


class DeviceValues:
    """The values of the groups and the norm to clip to, on the device; written only where they have changed."""

    def __init__(self) -> None:
        self.groups: Tensor | None = None
        """fp64 [G, 6], columns as GROUP_VALUES; None before the first `write`."""
        self.clip_norm: Tensor | None = None
        """fp32 scalar; None before the first `write` of one."""
        self._written: list[list[float]] = []
        self._clip_written: float | None = None

    def write(self, groups: Sequence[dict[str, Any]], clip_norm: float | None, device: torch.device) -> None:
        """Copy the values to the device, without waiting for it.

        Args:
            groups: of an AdamWEMA.
            clip_norm: None leaves the one on the device as it is.
            device: where the kernels run.
        """
        if clip_norm is not None:
            if self.clip_norm is None or self.clip_norm.device != device:
                self.clip_norm, self._clip_written = torch.empty((), device=device), None
            if self._clip_written != clip_norm:
                self.clip_norm.fill_(clip_norm)
                self._clip_written = clip_norm
        shape = len(groups), len(GROUP_VALUES)
        if self.groups is None or self.groups.shape != shape or self.groups.device != device:
            self.groups, self._written = torch.zeros(shape, dtype=torch.float64, device=device), []
        # A learning rate that lives on the device stays there.
        on_device = {
            number: group["lr"]
            for number, group in enumerate(groups)
            if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu"
        }
        rows = host_values(groups, on_device)
        if rows != self._written:
            host = torch.tensor(rows, dtype=torch.float64)
            self.groups.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)
            self._written = rows
        for number, lr in on_device.items():
            self.groups[number, 0].copy_(lr)


def host_values(groups: Sequence[dict[str, Any]], without_lr: Container[int] = ()) -> list[list[float]]:
    """The values as numbers, columns as GROUP_VALUES; lr is 0 for the groups of the numbers `without_lr`."""
    return [
        [
            0.0 if number in without_lr else float(group["lr"]),
            *map(float, group["betas"]),
            group["eps"],
            float(group["weight_decay"]),
            float(group["ema_momentum"]),
        ]
        for number, group in enumerate(groups)
    ]
