"""Two gloo processes under torch's DistributedDataParallel, in half precision."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import forked
from vjepa_fast.config.schema import Config
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA


def config(dtype: str) -> Config:
    return Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "pred_embed_dim": 16,
                "pred_depth": 1,
                "pred_num_heads": 2,
                "num_mask_tokens": 1,
            },
            "data": {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [4], "batch_size": 4},
            "mask": {"group_size": 4},
            "train": {"dtype": dtype},
        }
    )


def gradients(dtype: str, clip_range: range, parallel: bool) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    cfg = config(dtype)
    torch.manual_seed(0)
    model = VJEPA.from_config(cfg)
    clips = torch.randint(0, 256, (4, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    masks = MaskSampler(cfg.mask, (2, 4, 4), seed=0)(0, clip_range)
    forward = DistributedDataParallel(model) if parallel else model
    forward(clips[clip_range.start : clip_range.stop], masks).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


TOLERANCES = {"float32": 1e-5, "bfloat16": 0.03}


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    clips = range(2 * rank, 2 * rank + 2)
    torch.save({dtype: gradients(dtype, clips, True) for dtype in TOLERANCES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_of_the_masters_are_averaged(tmp_path: Path) -> None:
    forked.start_processes(process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for dtype, tolerance in TOLERANCES.items():
        whole = gradients(dtype, range(4), False)
        assert ranks[0][dtype].keys() == whole.keys()
        for name, grad in whole.items():
            ours = ranks[0][dtype][name]
            assert torch.equal(ours, ranks[1][dtype][name]), name
            assert grad.dtype == ours.dtype == torch.float32
            # A key bias has no gradient but rounding, so differences are measured against a typical gradient too.
            assert (ours - grad).norm() <= tolerance * (grad.norm() + 1e-3), name
