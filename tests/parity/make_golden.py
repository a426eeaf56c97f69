"""Write golden/*.json from runs of the references of which there are checkouts.

VJEPA2_REFERENCE=<checkout> python -m tests.parity.make_golden

Likewise VJEPA1_REFERENCE and VJEPA21_REFERENCE. Masks and frames are V-JEPA 2's.
"""

from __future__ import annotations

from typing import Any

import torch

from . import golden_format, reference_v2
from .cases import Case, recipe_weights, zero_gradient
from .frame_cases import frame_cases, frames_hash
from .mask_cases import MASK_CASES, MaskCase
from .reference import Run
from .release import RELEASES, V2, Release


def training(release: Release, case: Case) -> dict[str, Any]:
    """Three steps in float64 from the weights that cases.recipe_weights makes."""
    shapes = {name: tuple(value.shape) for name, value in release.build(case, torch.float32).weights().items()}
    return summaries(case, release.run_reference(case, recipe_weights(shapes, case.seed), torch.float64))


def summaries(case: Case, run: Run) -> dict[str, Any]:
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
    collate_masks = reference_v2.collator(case)
    torch.manual_seed(case.seed)
    return [
        golden_format.mask_hash(reference_v2.collate(collate_masks, case.batch_sizes(i)))
        for i in range(golden_format.NUM_MASK_BATCHES)
    ]


def frames() -> dict[str, list[int]]:
    """Start of the window (-1: there is none, -2: the loader gives up) and hash of the frame numbers of every case."""
    starts, hashes = [], []
    for seed, case in enumerate(frame_cases()):
        result = reference_v2.frame_numbers(case, seed)
        starts.append(-2 if result.numbers is None else -1 if result.start is None else result.start)
        hashes.append(0 if result.numbers is None else frames_hash(result.numbers))
    return {"starts": starts, "crc32_of_numbers": hashes}


def main() -> None:
    found = [release for release in RELEASES if release.checkout.is_there]
    if not found:
        wanted = ", or ".join(f"{release.checkout.variable} to {release.checkout}" for release in RELEASES)
        raise SystemExit(f"set {wanted}")
    torch.set_num_threads(1)
    for release in found:
        source = release.provenance()
        for name in release.golden:
            print(
                golden_format.write(f"train_{name}", {"provenance": source, **training(release, release.cases[name])})
            )
    if V2 in found:
        source = V2.provenance()
        hashes = {name: masks(case) for name, case in MASK_CASES.items()}
        print(golden_format.write("masks", {"provenance": source, "sha256_of_batches": hashes}))
        print(golden_format.write("frames", {"provenance": source, **frames()}))


if __name__ == "__main__":
    main()
