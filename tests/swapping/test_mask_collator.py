"""MaskCollator: the reference's constructor and output."""

from __future__ import annotations

import functools
import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vjepa_fast as vf
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.interop.meta import MaskCollator

BLOCKS = {"spatial_scale": (0.15, 0.15), "temporal_scale": (1.0, 1.0), "aspect_ratio": (0.75, 1.5), "num_blocks": 2}
WIDE = BLOCKS | {"spatial_scale": (0.4, 0.7), "num_blocks": 1, "max_keep": 20, "of_nobody": 1}
V2 = functools.partial(
    MaskCollator, cfgs_mask=[BLOCKS, WIDE], dataset_fpcs=[8, 4, 8], crop_size=64, patch_size=16, tubelet_size=2
)


class Clips(Dataset[Any]):
    """(buffer, label, clip_indices), of 8 and 4 frames in turns."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        frames = 4 if index % 3 == 0 else 8
        return [torch.zeros(3, frames, 2, 2)], index, [np.arange(frames)]


def check_masks(enc: list[Tensor], pred: list[Tensor], batch_size: int, num_tokens: int) -> None:
    assert len(enc) == len(pred) == 2
    for seen, wanted in zip(enc, pred, strict=True):
        for ids in (seen, wanted):
            assert ids.dtype == torch.int64 and ids.shape[0] == batch_size and ids.shape[1] > 0
            assert (ids.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < num_tokens
        assert not any(set(a.tolist()) & set(b.tolist()) for a, b in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("source", ["counter", "reference"])
def test_groups(source: Any) -> None:
    data, collator = Clips(), V2(source=source)
    first, second = collator([data[i] for i in range(6)])
    for (udata, enc, pred), frames, size in ((first, 8, 4), (second, 4, 2)):
        assert udata[0][0].shape == (size, 3, frames, 2, 2) and udata[2][0].shape == (size, frames)
        check_masks(enc, pred, size, frames * 8)
        assert enc[1].shape[1] <= 20
    # What is not in the batch is not in the output.
    [(udata, _, _)] = collator([data[1], data[2]])
    assert udata[0][0].shape[2] == 8
    with pytest.raises(ValueError, match=r"\b6 frames.*dataset_fpcs.*8, 4"):
        collator([([torch.zeros(1)], 0, [np.arange(6)])])


def test_masks_are_those_of_the_sampler() -> None:
    collator = V2(seed=5)
    collator.step()
    data = Clips()
    [_, (_, enc, pred)] = collator([data[i] for i in range(6)])
    cfg = vf.load_recipe("vitl16-256", []).mask.model_copy(update={"group_size": None})
    cfg.masks = [
        type(cfg.masks[0]).model_validate({key: value for key, value in options.items() if key != "of_nobody"})
        for options in (BLOCKS, WIDE)
    ]
    expected = vf.MaskSampler(cfg, (2, 4, 4), 5, 1)(1, range(2)).to_meta()
    for found, wanted in zip((enc, pred), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("source", ["counter", "reference"])
def test_v1_and_tubes(source: Any) -> None:
    for cfgs in ([BLOCKS, WIDE], [{"ratio": 0.9}, {"ratio": 0.6}]):
        collator = MaskCollator(
            cfgs_mask=cfgs, crop_size=(64, 64), num_frames=8, patch_size=16, tubelet_size=2, source=source
        )
        udata, enc, pred = collator([Clips()[i] for i in (1, 2)])
        assert udata[0][0].shape == (2, 3, 8, 2, 2)
        check_masks(enc, pred, 2, 64)
    # int(16 * 0.1) and int(16 * 0.4) places of 16, the same in all four frames.
    assert [ids.shape[1] for ids in enc] == [4, 24] and [ids.shape[1] for ids in pred] == [60, 40]
    for ids in enc:
        assert torch.equal(ids.view(2, 4, -1) % 16, (ids.view(2, 4, -1) % 16)[:, :1].expand(-1, 4, -1))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_count(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    collator = V2()
    # A process that is spawned imports everything anew.
    workers = 2 if method == "fork" else 1
    loader = DataLoader(Clips(), batch_size=3, num_workers=workers, collate_fn=collator, multiprocessing_context=method)
    sizes = {enc[0].shape for batch in loader for _, enc, _ in batch}
    assert len(sizes) > 1
    assert [group.calls.value for group in collator.groups.values()] == [4, 4]


def test_ranks_differ_and_calls_repeat() -> None:
    batch = [Clips()[i] for i in range(6)]

    def drawn(seed: int) -> list[Tensor]:
        return [ids for _, enc, _ in V2(seed=seed)(batch) for ids in enc]

    assert all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(0), strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(drawn(0), drawn(1), strict=True))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"spatial_scale": (0.1, 0.2)}, r"cfgs_mask\[1\].*temporal_scale.*aspect_ratio.*num_blocks"),
        (BLOCKS | {"spatial_scale": (0.5, 0.2)}, r"cfgs_mask\[1\].*spatial_scale\b.*\[0\.5, 0\.2\]"),
        ({"ratio": 1.5}, r"cfgs_mask\[1\].*\bratio\b.*\b1\.5\b.*\b1\b"),
    ],
)
def test_masks_that_make_no_sense(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskCollator([BLOCKS, cfg], dataset_fpcs=[8])
