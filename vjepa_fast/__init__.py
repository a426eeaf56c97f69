"""vjepa-fast: pretraining with V-JEPA. Names are imported on first use, so that `import vjepa_fast` costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load_config": "config",
    "load_recipe": "config",
    "VJEPA": "models.jepa",
    "MaskSampler": "masking.sampler",
    "MaskBatch": "masking.batch",
    "AdamWEMA": "optim.adamw_ema",
    "build_loader": "data.loader",
    "Trainer": "train.trainer",
    "load": "inference.loading",
    "swap": "swapping.swap",
}

__all__ = [
    "AdamWEMA",
    "MaskBatch",
    "MaskSampler",
    "Trainer",
    "VJEPA",
    "__version__",
    "build_loader",
    "load",
    "load_config",
    "load_recipe",
    "swap",
]

if TYPE_CHECKING:
    from vjepa_fast.config import load_config, load_recipe
    from vjepa_fast.data.loader import build_loader
    from vjepa_fast.inference.loading import load
    from vjepa_fast.masking.batch import MaskBatch
    from vjepa_fast.masking.sampler import MaskSampler
    from vjepa_fast.models.jepa import VJEPA
    from vjepa_fast.optim.adamw_ema import AdamWEMA
    from vjepa_fast.swapping.swap import swap
    from vjepa_fast.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name == "interop":
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vjepa_fast' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
