"""Write golden/train_v1_*.json from runs of V-JEPA 1.

VJEPA1_REFERENCE=<checkout> python -m tests.parity.make_golden_v1
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import torch

from . import golden_format, meta_v1_reference
from .cases import recipe_weights
from .make_golden import summaries
from .v1_cases import V1_CASES

SOURCES = (
    "app/vjepa/train.py",
    "app/vjepa/utils.py",
    "src/models/predictor.py",
    "src/models/vision_transformer.py",
    "src/utils/schedulers.py",
)


def provenance() -> dict[str, Any]:
    """Where the numbers come from."""
    files = {name: (meta_v1_reference.root() / name).read_bytes() for name in SOURCES}
    return {
        "reference": "facebookresearch/jepa",
        "sha256": {name: hashlib.sha256(text).hexdigest() for name, text in files.items()},
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    if "VJEPA1_REFERENCE" not in os.environ:
        raise SystemExit("set VJEPA1_REFERENCE to a checkout of facebookresearch/jepa")
    torch.set_num_threads(1)
    for case in V1_CASES.values():
        shapes = {name: tuple(value.shape) for name, value in meta_v1_reference.build(case).weights().items()}
        run = meta_v1_reference.run(case, recipe_weights(shapes, case.seed), torch.float64)
        print(golden_format.write(f"train_{case.name}", {"provenance": provenance(), **summaries(case, run)}))


if __name__ == "__main__":
    main()
