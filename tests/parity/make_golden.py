"""Write golden/*.json from runs of the reference: VJEPA2_REFERENCE=<checkout> python -m tests.parity.make_golden"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vjepa_fast.bench.reference import REFERENCE_COMMIT

from . import golden_format, meta_reference
from .cases import CASES, Case, recipe_weights, zero_gradient
from .frame_cases import frame_cases, frames_hash
from .mask_cases import MASK_CASES, MaskCase

SOURCES = (
    "app/vjepa/utils.py",
    "src/datasets/video_dataset.py",
    "src/masks/multiseq_multiblock3d.py",
    "src/models/predictor.py",
    "src/models/utils/modules.py",
    "src/models/vision_transformer.py",
    "src/utils/schedulers.py",
)


def provenance() -> dict[str, Any]:
    """Where the numbers come from."""
    root = Path(os.environ["VJEPA2_REFERENCE"])
    return {
        "reference": "facebookresearch/vjepa2",
        "commit": REFERENCE_COMMIT,
        "sha256": {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in SOURCES},
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def training(case: Case) -> dict[str, Any]:
    """Three steps in float64 from the weights that cases.recipe_weights makes."""
    shapes = {name: tuple(value.shape) for name, value in meta_reference.build(case).weights().items()}
    return summaries(case, meta_reference.run(case, recipe_weights(shapes, case.seed), torch.float64))


def summaries(case: Case, run: meta_reference.Run) -> dict[str, Any]:
    """What a golden file holds of a run."""
    for step in run.steps:
        if case.loss_exp == 1 and step.margin < 1e-5:
            raise SystemExit(f"{case.name}: a prediction lies {step.margin:.1e} from its target; change Case.seed")
    return {
        "steps": [
            {
                "loss": step.loss,
                "lr": step.lr,
                "weight_decay": step.weight_decay,
                "momentum": step.momentum,
                "gradients": {
                    name: None if value is None else golden_format.summary(name, zero_gradient(name, case, value))
                    for name, value in step.gradients.items()
                },
            }
            for step in run.steps
        ],
        "weights": {name: golden_format.summary(name, value) for name, value in run.weights.items()},
    }


def masks(case: MaskCase) -> list[str]:
    """Hashes of the first batches under torch.manual_seed(case.seed)."""
    collate_masks = meta_reference.collator(case)
    torch.manual_seed(case.seed)
    return [
        golden_format.mask_hash(meta_reference.collate(collate_masks, case.batch_sizes(i)))
        for i in range(golden_format.NUM_MASK_BATCHES)
    ]


def frames() -> dict[str, list[int]]:
    """Start of the window (-1: there is none, -2: the loader gives up) and hash of the frame numbers of every case."""
    starts, hashes = [], []
    for seed, case in enumerate(frame_cases()):
        result = meta_reference.frame_numbers(case, seed)
        starts.append(-2 if result.numbers is None else -1 if result.start is None else result.start)
        hashes.append(0 if result.numbers is None else frames_hash(result.numbers))
    return {"starts": starts, "crc32_of_numbers": hashes}


def main() -> None:
    if "VJEPA2_REFERENCE" not in os.environ:
        raise SystemExit("set VJEPA2_REFERENCE to a checkout of facebookresearch/vjepa2")
    torch.set_num_threads(1)
    source = provenance()
    for case in CASES.values():
        print(golden_format.write(f"train_{case.name}", {"provenance": source, **training(case)}))
    hashes = {name: masks(case) for name, case in MASK_CASES.items()}
    print(golden_format.write("masks", {"provenance": source, "sha256_of_batches": hashes}))
    print(golden_format.write("frames", {"provenance": source, **frames()}))


if __name__ == "__main__":
    main()
