"""The three releases of V-JEPA that are compared, each with its cases, its reference and what ours does alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from . import ours, reference_v1, reference_v2, reference_v21
from .cases import CASES, Batch, Case, make_batch, recipe_weights, uniform
from .cases_v1 import V1_CASES, v1_batch
from .cases_v21 import DENSE_CASES, GOLDEN_CASES
from .reference import Checkout, Run, Training, Triple


@dataclass(frozen=True)
class Release:
    """One release.

    Attributes:
        name: v1, v2 or v21.
        checkout: of the reference, with the environment variable that names it.
        cases: training runs, by name.
        golden: names of the cases whose numbers golden/train_<name>.json keeps.
        sources: files of the checkout that these numbers come from.
        build: the reference's networks of a case.
        training: the reference's step over them.
        batch: of a case and a step, as the reference takes it.
        inputs: of a step, as ours takes it; may prepare the model, too.
        from_recipe: comparisons start from cases.recipe_weights and not from the reference's initialisation.
        num_tables: position tables, which stay as they are.
        num_unused: at most so many other tensors of a case do.
    """

    name: str
    checkout: Checkout
    cases: Mapping[str, Any]
    golden: Sequence[str]
    sources: Sequence[str]
    build: Callable[[Any, torch.dtype], Triple]
    training: Callable[[Triple, Any], Training]
    batch: Callable[[Any, int], Batch]
    inputs: ours.Inputs
    from_recipe: bool
    num_tables: int
    num_unused: Callable[[Any], int]

    def run_reference(self, case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Run:
        """`case.num_steps` steps of the reference from `weights`."""
        triple = self.build(case, dtype)
        triple.load(weights)
        training = self.training(triple, case)
        steps = [training.step(self.batch(case, number)) for number in range(case.num_steps)]
        return Run(steps, triple.weights())

    def run_ours(self, case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> ours.OurRun:
        """The same with vjepa_fast."""
        return ours.run(case, weights, dtype, self.inputs)

    def start(self, case: Case) -> dict[str, torch.Tensor]:
        """Where comparisons start, without anything that is constant or equal: the recipe's weights, or the
        reference's initialisation with noise."""
        torch.manual_seed(case.seed)
        weights = self.build(case, torch.float32).weights()
        if self.from_recipe:
            return recipe_weights({name: tuple(value.shape) for name, value in weights.items()}, case.seed)
        for name, value in weights.items():
            if name.endswith("pos_embed"):
                continue
            is_constant = value.ndim == 1 or "mask_tokens" in name or "mod_embed" in name
            if is_constant or name.startswith("target_encoder."):
                scale = 0.1 if value.ndim == 1 else 0.02
                weights[name] = value + (scale * uniform(f"start/{name}", value.shape)).to(value.dtype)
        return weights

    def provenance(self) -> dict[str, Any]:
        """Where the numbers of a golden file come from."""
        files = {name: (self.checkout.root / name).read_bytes() for name in self.sources}
        return {
            "reference": self.checkout.repository,
            **({} if self.checkout.commit is None else {"commit": self.checkout.commit}),
            "sha256": {name: hashlib.sha256(text).hexdigest() for name, text in files.items()},
            "torch": torch.__version__,
            "numpy": np.__version__,
        }


V1 = Release(
    name="v1",
    checkout=reference_v1.CHECKOUT,
    cases=V1_CASES,
    golden=tuple(V1_CASES),
    sources=(
        "app/vjepa/train.py",
        "app/vjepa/utils.py",
        "src/models/predictor.py",
        "src/models/vision_transformer.py",
        "src/utils/schedulers.py",
    ),
    build=reference_v1.build,
    training=reference_v1.Training,
    batch=v1_batch,
    inputs=ours.v1_inputs,
    from_recipe=True,
    num_tables=3,
    num_unused=lambda case: 0,
)

V2 = Release(
    name="v2",
    checkout=reference_v2.CHECKOUT,
    cases=CASES,
    golden=tuple(CASES),
    sources=(
        "app/vjepa/utils.py",
        "src/datasets/video_dataset.py",
        "src/masks/multiseq_multiblock3d.py",
        "src/models/predictor.py",
        "src/models/utils/modules.py",
        "src/models/vision_transformer.py",
        "src/utils/schedulers.py",
    ),
    build=reference_v2.build,
    training=reference_v2.Training,
    batch=make_batch,
    inputs=ours.v2_inputs,
    from_recipe=False,
    num_tables=3,
    # The mask tokens of groups that no batch has.
    num_unused=lambda case: case.num_mask_tokens - len(case.frames),
)

V21 = Release(
    name="v21",
    checkout=reference_v21.CHECKOUT,
    cases=DENSE_CASES,
    golden=GOLDEN_CASES,
    sources=(
        "app/vjepa_2_1/models/predictor.py",
        "app/vjepa_2_1/models/utils/masks_dist.py",
        "app/vjepa_2_1/models/utils/modules.py",
        "app/vjepa_2_1/models/vision_transformer.py",
        "app/vjepa_2_1/train.py",
        "app/vjepa_2_1/utils.py",
        "src/utils/schedulers.py",
    ),
    build=reference_v21.build,
    training=reference_v21.Training,
    batch=make_batch,
    inputs=ours.v21_inputs,
    from_recipe=False,
    num_tables=0,
    # The mask token that nobody uses, and with videos alone what is of images, or the other way round.
    num_unused=lambda case: 1 if len(case.frames) == 2 else 8,
)

RELEASES = (V1, V2, V21)


def of_every_case(golden: bool) -> pytest.MarkDecorator:
    """A test of a release and a case: of those with golden numbers, or of all, which need the checkout."""
    return pytest.mark.parametrize(
        ("release", "case"),
        [
            pytest.param(release, release.cases[name], id=name, marks=[] if golden else [release.checkout.needed])
            for release in RELEASES
            for name in (release.golden if golden else release.cases)
        ],
    )
