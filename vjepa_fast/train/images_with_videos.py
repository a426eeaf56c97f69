"""Trains on images and videos in every step (V-JEPA 2.1).

In the reference some processes train on images and the others on videos, and gradients are averaged over all of them
(facebookresearch/vjepa2 at 204698b, app/vjepa_2_1/train.py, img_data.rank_ratio). Here every process has its share of
both, in one packed pass: images are one more frames-per-clip group, with the weight in the loss that the processes for
images have there. A step has as many images and videos and the same loss, a single process can train like that, and no
process waits for one that has longer clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import Batch, BrokenVideo, Loader, build_loader
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import StepMasks


class JointLoader:
    """Two loaders as one: the last group of a batch is its images. As vjepa_fast.data.loader.Loader."""

    def __init__(self, videos: Loader, images: Loader) -> None:
        self._videos, self._images = videos, images
        self.fpcs = [*videos.fpcs, *images.fpcs]
        self.num_videos = videos.num_videos + images.num_videos
        self.clips_per_epoch = videos.clips_per_epoch
        """Of videos, which decide how long an epoch is."""

    @property
    def num_tried(self) -> int:
        """Distinct videos and images opened so far on this process."""
        return self._videos.num_tried + self._images.num_tried

    def state_dict(self) -> dict[str, int]:
        """As Loader."""
        return self._videos.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """As Loader."""
        for loader in (self._videos, self._images):
            loader.load_state_dict(state)

    def broken(self) -> list[BrokenVideo]:
        """As Loader."""
        return self._videos.broken() + self._images.broken()

    def close(self) -> None:
        """As Loader."""
        self._videos.close()
        self._images.close()

    def __iter__(self) -> Iterator[Batch]:
        for videos, images in zip(self._videos, self._images, strict=True):
            assert videos.step == images.step
            yield Batch(
                videos.step,
                videos.clips + images.clips,
                videos.sample_ids + images.sample_ids,
                [*videos.group_ids, len(self.fpcs) - 1],
                videos.labels + images.labels,
            )


class JointMasks:
    """Masks of the batches of a JointLoader. As vjepa_fast.masking.sampler.StepMasks.

    Args:
        videos, images: masks of either.
        image_share: of the loss; the rest is that of the videos.
    """

    reference = None

    def __init__(self, videos: StepMasks, images: StepMasks, image_share: float) -> None:
        self._videos, self._images, self._image_share = videos, images, image_share
        self.grids = [*videos.grids, *images.grids]

    def __call__(
        self, step: int, sample_ids: Sequence[Tensor], group_ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> list[MaskBatch]:
        """As StepMasks; the last group is that of the images, which uses the first mask token as videos do."""
        videos = self._videos(step, sample_ids[:-1], group_ids[:-1], device)
        (images,) = self._images(step, sample_ids[-1:], [0], device)
        share = self._image_share
        return [*(batch.scaled(1 - share) for batch in videos), replace(images.scaled(share), mask_token=0)]

    def state_dict(self) -> dict[str, object]:
        """As StepMasks: masks from counters have no state."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """As StepMasks."""


def add_images(videos: Loader, cfg: Config, rank: int, world_size: int, device: torch.device) -> JointLoader:
    """The loader of videos with that of the images of `cfg.img_data`.

    Raises:
        UserError: a manifest of images cannot be used.
    """
    own = cfg.img_data
    assert own is not None
    data = cfg.data.model_copy(
        update={
            "datasets": own.datasets,
            "datasets_weights": own.datasets_weights,
            "dataset_fpcs": [1] * len(own.datasets),
            "batch_size": own.per_process,
            "global_batch_size": None,
            "clips_per_video": 1,
            "num_workers": cfg.data.num_workers if own.num_workers is None else own.num_workers,
            # Another order than that of the videos.
            "seed": cfg.data.seed ^ 1,
        }
    )
    return JointLoader(videos, build_loader(data, rank, world_size, device))


def add_image_masks(videos: StepMasks, cfg: Config, rank: int, world_size: int) -> JointMasks:
    """The masks of videos with those of images.

    Raises:
        ConfigError: masks that only videos can have.
    """
    assert cfg.img_data is not None
    mask = cfg.img_mask or cfg.mask
    if "reference" in (cfg.mask.source, mask.source):
        raise ConfigError(
            "mask.source=reference is the stream of videos alone; set mask.source=counter to train on "
            "images too (img_data)"
        )
    count = cfg.img_data.per_process
    size = mask.group_size if cfg.img_mask is not None and mask.group_size is not None else count
    images = StepMasks(
        mask.model_copy(update={"group_size": size, "clips_per_mask": 1}),
        fpcs=[1],
        crop_size=cfg.data.crop_size,
        patch_size=cfg.data.patch_size,
        tubelet_size=1,
        seed=cfg.train.seed ^ 1,
        global_batch=count * world_size,
        group_of=lambda ids: np.zeros(np.shape(ids), dtype=np.int64),
        rank=rank,
        world_size=world_size,
        sum_over_processes=videos.sum_over_processes,
    )
    return JointMasks(videos, images, cfg.img_data.rank_ratio)
