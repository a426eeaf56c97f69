"""What float8 in the target encoder does to targets and loss, on a run of the demo.

    vjepa-fast train --out RUN
    python -m experiments.float8_targets RUN

Loads the run's checkpoint twice, as it is and with `model.target_precision=float8`, and feeds both the held-out clips
of the demo: cosine between the layer-normed targets of each predicted token, and the loss against both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import vjepa_fast as vf
from vjepa_fast.checkpoints.meta_format import load_checkpoint
from vjepa_fast.checkpoints.run_folder import LATEST
from vjepa_fast.common.cache_dir import default_cache_dir
from vjepa_fast.data.generated.registry import SYNTHETIC_SIZE
from vjepa_fast.data.generated.synthetic import make_synthetic
from vjepa_fast.evaluation.demo import read_split


@torch.no_grad()
def measure(run: Path, num_batches: int) -> dict[str, float]:
    """Mean and smallest cosine, and the mean loss against either target."""
    cfg = vf.load_config(run / "config.yaml")
    models = []
    for precision in ("same", "float8"):
        model = vf.VJEPA(cfg.model.model_copy(update={"target_precision": precision}), cfg.loss.loss_exp)
        load_checkpoint(run / LATEST, model)
        models.append(model)
    exact, low = models
    data = make_synthetic((cfg.data.cache_dir or default_cache_dir()) / "demo", *SYNTHETIC_SIZE)
    clips = read_split(data.val_csv, cfg.data).clips
    sampler = vf.MaskSampler(cfg.mask, exact.encoder.grid_of(clips), cfg.train.seed)
    cosines, losses = [], []
    size = 16
    for step in range(min(num_batches, len(clips) // size)):
        some = clips[step * size : (step + 1) * size]
        masks = sampler(step, range(step * size, (step + 1) * size))
        outputs = [model(some, masks) for model in (exact, low)]
        cosines.append(F.cosine_similarity(outputs[0].packed_targets, outputs[1].packed_targets, dim=-1))
        losses.append([float(out.loss) for out in outputs])
    values = torch.cat(cosines)
    mean = torch.tensor(losses).mean(0).tolist()
    return {
        "tokens": len(values),
        "cosine_mean": float(values.mean()),
        "cosine_smallest": float(values.min()),
        "loss_same": mean[0],
        "loss_float8": mean[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=12)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.run, arguments.batches), indent=1))


if __name__ == "__main__":
    main()
