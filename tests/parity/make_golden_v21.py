"""Write golden/train_dense_*.json from runs of V-JEPA 2.1.

VJEPA21_REFERENCE=<checkout> python -m tests.parity.make_golden_v21
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import torch

from . import golden_format, v21_reference
from .cases import recipe_weights
from .make_golden import summaries
from .v21_cases import DENSE_CASES, GOLDEN_CASES

SOURCES = (
    "app/vjepa_2_1/models/predictor.py",
    "app/vjepa_2_1/models/utils/masks_dist.py",
    "app/vjepa_2_1/models/utils/modules.py",
    "app/vjepa_2_1/models/vision_transformer.py",
    "app/vjepa_2_1/train.py",
    "app/vjepa_2_1/utils.py",
    "src/utils/schedulers.py",
)


def provenance() -> dict[str, Any]:
    """Where the numbers come from."""
    files = {name: (v21_reference.root() / name).read_bytes() for name in SOURCES}
    return {
        "reference": "facebookresearch/vjepa2",
        "commit": "204698b",
        "sha256": {name: hashlib.sha256(text).hexdigest() for name, text in files.items()},
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    if "VJEPA21_REFERENCE" not in os.environ:
        raise SystemExit("set VJEPA21_REFERENCE to a checkout of facebookresearch/vjepa2 with app/vjepa_2_1")
    torch.set_num_threads(1)
    for name in GOLDEN_CASES:
        case = DENSE_CASES[name]
        shapes = {key: tuple(value.shape) for key, value in v21_reference.build(case).weights().items()}
        run = v21_reference.run(case, recipe_weights(shapes, case.seed), torch.float64)
        print(golden_format.write(f"train_{name}", {"provenance": provenance(), **summaries(case, run)}))


if __name__ == "__main__":
    main()
