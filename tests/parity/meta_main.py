"""Run the reference's own training script on our batches: python -m tests.parity.meta_main FOLDER

app/vjepa/train.py runs unchanged in one gloo process: its model, optimizer, schedules, data parallel wrappers, log,
checkpoints and resume. Only what reads videos is replaced. It continues from FOLDER/latest.pt if there is one, keeps
every epoch as e<epoch>.pt (counted from 0) and logs the loss of every step in log_r0.csv.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import reference_v2
from .cases import OPTIMIZATION, Case, make_batch

CASE = Case("main", frames=(8, 4))


class Loader:
    """All batches of the run, in the form in which the reference's collator returns them.

    The reference asks for an iterator once per start of the script, so a resumed run begins at its own first step.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step

    def __len__(self) -> int:
        return OPTIMIZATION["ipe"]

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.first_step, OPTIMIZATION["ipe"] * OPTIMIZATION["epochs"]):
            batch = make_batch(CASE, step)
            groups = zip(batch.clips, batch.masks_enc, batch.masks_pred, strict=True)
            yield [
                ([[reference_v2.normalise(clip, torch.float32)], None, [torch.zeros(clip.shape[:2])]], enc, pred)
                for clip, enc, pred in groups
            ]


def arguments(folder: Path) -> dict[str, Any]:
    """The run of CASE.config() as one of the reference's YAML files would say it."""
    return {
        "folder": str(folder),
        "meta": {
            "load_checkpoint": True,
            "read_checkpoint": None,
            "seed": 5,
            "save_every_freq": 1,
            "use_sdpa": True,
            "dtype": "float32",
        },
        "mask": [
            {"spatial_scale": (0.15, 0.15), "temporal_scale": (1.0, 1.0), "aspect_ratio": (0.75, 1.5), "num_blocks": 1}
            for _ in range(CASE.num_masks)
        ],
        "model": {
            "model_name": "vit_parity",
            "pred_depth": CASE.pred_depth,
            "pred_embed_dim": CASE.pred_embed_dim,
            "pred_num_heads": CASE.pred_num_heads,
            "use_rope": True,
            "use_mask_tokens": True,
        },
        "data": {
            "datasets": [],
            "dataset_fpcs": list(CASE.frames),
            "batch_size": CASE.batch_size,
            "crop_size": CASE.crop_size,
            "patch_size": CASE.patch_size,
            "tubelet_size": CASE.tubelet_size,
            "fps": 4,
        },
        "data_aug": {},
        "loss": {"loss_exp": 1.0},
        "optimization": dict(OPTIMIZATION),
    }


def main(folder: Path) -> None:
    latest = folder / "latest.pt"
    first_epoch = torch.load(latest, weights_only=True)["epoch"] if latest.exists() else 0
    sampler = types.SimpleNamespace(set_epoch=lambda epoch: None)
    data_manager, transforms = types.ModuleType("data_manager"), types.ModuleType("transforms")
    loader = Loader(first_epoch * OPTIMIZATION["ipe"])
    data_manager.init_data = lambda **_: (loader, sampler)  # type: ignore[attr-defined]
    transforms.make_transforms = lambda **_: None  # type: ignore[attr-defined]
    with reference_v2.CHECKOUT.environment():
        sys.modules["src.datasets.data_manager"] = data_manager
        sys.modules["app.vjepa.transforms"] = transforms
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    # The script looks sizes up by name in this module.
    reference_v2.modules().vit.vit_parity = functools.partial(
        reference_v2.modules().vit.VisionTransformer,
        embed_dim=CASE.embed_dim,
        depth=CASE.depth,
        num_heads=CASE.num_heads,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )
    reference_v2.training_script().main(arguments(folder))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
