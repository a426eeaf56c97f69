"""A reference's own training script, with vf.swap or without: python -m tests.parity.meta_swap_main v2 A swap:B

app/vjepa/train.py runs unchanged in one gloo process, with its model, optimizer, moving average, data parallel wrappers
and checkpoints; what reads videos is replaced by our batches. It runs once for each folder. With `swap:` before it, the
modules that init_video_model made are swapped, which is all that a user has to add. The folder's losses.json then has
the losses of all steps, in full, and how often our attention ran. It continues from the checkpoint there if there is
one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import vjepa_fast as vf
from vjepa_fast.bench.reference import import_environment, normalise
from vjepa_fast.models import layers

from .cases import OPTIMIZATION, Case, make_batch

IPE, EPOCHS = OPTIMIZATION["ipe"], OPTIMIZATION["epochs"]


@dataclass(frozen=True)
class Version:
    """One version of the reference.

    Attributes:
        variable: of the environment, naming a checkout.
        app: the package with train.py.
        vit: the module whose functions make encoders.
        name: of the function that we put there.
        case: sizes and batches.
        latest: name of the checkpoint that it resumes from.
        kept: name of the one that it keeps of an epoch.
        sections: of its config, on top of those that all share.
    """

    variable: str
    app: str
    vit: str
    name: str
    case: Case
    latest: str
    kept: str
    sections: dict[str, dict[str, Any]]


VERSIONS = {
    "v1": Version(
        "VJEPA1_REFERENCE",
        "app.vjepa",
        "src.models.vision_transformer",
        "vit_parity",
        Case("swap_v1", use_rope=False, uniform_power=True, pred_embed_dim=48, pred_num_heads=3),
        "run-latest.pth.tar",
        "run-e{}.pth.tar",
        {
            "logging": {"write_tag": "run"},
            "data": {"num_clips": 1, "num_frames": 8},
            "loss": {"reg_coeff": 0.3},
            "optimization": {"clip_grad": 0.1},
        },
    ),
    "v1 noised": Version(
        "VJEPA1_REFERENCE",
        "app.vjepa",
        "src.models.vision_transformer",
        "vit_parity",
        Case("swap_v1", use_rope=False, uniform_power=True, pred_embed_dim=48, pred_num_heads=3),
        "run-latest.pth.tar",
        "run-e{}.pth.tar",
        {
            "logging": {"write_tag": "run"},
            "data": {"num_clips": 1, "num_frames": 8},
            "loss": {"reg_coeff": 0.0},
            "model": {"use_mask_tokens": False},
        },
    ),
    "v2": Version(
        "VJEPA2_REFERENCE",
        "app.vjepa",
        "src.models.vision_transformer",
        "vit_parity",
        Case("swap_v2", frames=(8, 4)),
        "latest.pt",
        "e{}.pt",
        {},
    ),
    # The script knows widths by name and normalises targets in pieces of them, unless there is one level.
    "v2.1": Version(
        "VJEPA21_REFERENCE",
        "app.vjepa_2_1",
        "app.vjepa_2_1.models.vision_transformer",
        "vit_large",
        Case("swap_v21", crop_size=64, patch_size=16, depth=12, pred_depth=4),
        "latest.pth.tar",
        "e{}.pth.tar",
        {
            "model": {
                "levels_predictor": 1,
                "interpolate_rope": True,
                "img_temporal_dim_size": 1,
                "modality_embedding": True,
                "lambda_value_vid": 0.5,
                "lambda_progressive": False,
            },
            "loss": {"predict_all": True, "weight_distance_loss": True, "shift_by_n": 0},
        },
    ),
}


class Loader:
    """All batches of the run, in the form in which the version's collator returns them."""

    def __init__(self, version: Version, first_step: int) -> None:
        self.version, self.first_step = version, first_step

    def __len__(self) -> int:
        return int(IPE)

    def __iter__(self) -> Iterator[Any]:
        case = self.version.case
        for step in range(self.first_step, IPE * EPOCHS):
            batch = make_batch(case, step)
            clips = [normalise(clip, torch.float32).contiguous() for clip in batch.clips]
            if self.version.variable == "VJEPA1_REFERENCE":
                yield (clips, None, None), batch.masks_enc[0], batch.masks_pred[0]
                continue
            yield [
                ([[x], None, [torch.zeros(len(x), x.shape[2])]], enc, pred)
                for x, enc, pred in zip(clips, batch.masks_enc, batch.masks_pred, strict=True)
            ]


def arguments(version: Version, folder: Path) -> dict[str, Any]:
    """The run as one of the reference's YAML files would say it."""
    case = version.case
    config: dict[str, Any] = {
        "folder": str(folder),
        "logging": {"folder": str(folder)},
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
            for _ in range(case.num_masks)
        ],
        "model": {
            "model_name": version.name,
            "pred_depth": case.pred_depth,
            "pred_embed_dim": case.pred_embed_dim,
            "pred_num_heads": case.pred_num_heads,
            "use_rope": case.use_rope,
            "use_mask_tokens": True,
        },
        "data": {
            "datasets": [],
            "dataset_fpcs": list(case.frames),
            "batch_size": case.batch_size,
            "crop_size": case.crop_size,
            "patch_size": case.patch_size,
            "tubelet_size": case.tubelet_size,
            "fps": 4,
        },
        "data_aug": {},
        "loss": {"loss_exp": 1.0},
        "optimization": dict(OPTIMIZATION),
    }
    for section, values in version.sections.items():
        config[section] |= values
    return config


def _swapping(init_video_model: Any) -> Any:
    def init(**options: Any) -> tuple[nn.Module, nn.Module]:
        encoder, predictor = init_video_model(**options)
        parameters = [*encoder.parameters(), *predictor.parameters()]
        fast_encoder, fast_predictor, _ = vf.swap(encoder, predictor)
        now = [*fast_encoder.parameters(), *fast_predictor.parameters()]
        assert all(one is other for one, other in zip(now, parameters, strict=True))
        return fast_encoder, fast_predictor

    return init


def main(version: Version, folder: Path, swap: bool) -> None:
    case, latest = version.case, folder / version.latest
    first_epoch = torch.load(latest, weights_only=True)["epoch"] if latest.exists() else 0
    sampler = types.SimpleNamespace(set_epoch=lambda epoch: None)
    data_manager, transforms = types.ModuleType("data_manager"), types.ModuleType("transforms")
    loader = Loader(version, first_epoch * IPE)
    data_manager.init_data = transforms.make_transforms = None  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    losses: list[float] = []
    calls = 0
    attention = layers.attention

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return attention(*args)

    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(layers, "attention", counted))
        changes.enter_context(import_environment(Path(os.environ[version.variable]).resolve()))
        sys.modules["src.datasets.data_manager"] = data_manager
        sys.modules[f"{version.app}.transforms"] = transforms
        train, vit = importlib.import_module(f"{version.app}.train"), importlib.import_module(version.vit)

        class Logger(train.CSVLogger):  # type: ignore[misc, name-defined]
            def log(self, *values: Any) -> None:
                losses.append(values[2])
                super().log(*values)

        changes.enter_context(
            mock.patch.multiple(
                train, CSVLogger=Logger, init_data=lambda **_: (loader, sampler), make_transforms=lambda **_: None
            )
        )
        if swap:
            swapping = _swapping(train.init_video_model)
            changes.enter_context(mock.patch.object(train, "init_video_model", swapping))
        # The script looks sizes up by name in this module.
        setattr(
            vit,
            version.name,
            functools.partial(
                vit.VisionTransformer,
                embed_dim=case.embed_dim,
                depth=case.depth,
                num_heads=case.num_heads,
                norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            ),
        )
        train.main(arguments(version, folder))
    torch.distributed.destroy_process_group()
    (folder / "losses.json").write_text(json.dumps({"losses": losses, "calls": calls}))


if __name__ == "__main__":
    for job in sys.argv[2:]:
        main(VERSIONS[sys.argv[1]], Path(job.removeprefix("swap:")).resolve(), job.startswith("swap:"))
