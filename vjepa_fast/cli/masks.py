"""`vjepa-fast masks`: draws the masks of a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import typer

from vjepa_fast.cli.config import ConfigOption, Overrides, RecipeOption, load
from vjepa_fast.cli.console import exit_codes
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config import Config
from vjepa_fast.config.mask_strategies import STRATEGIES

if TYPE_CHECKING:
    from vjepa_fast.masking.batch import MaskBatch
    from vjepa_fast.masking.picture import Panel

EPILOG = """
Strategies (mask.masks.N.strategy), and what they predict:

{strategies}

Examples:

  vjepa-fast masks --recipe vitl16-256

  vjepa-fast masks --recipe vitl16-256 --video clip.mp4 --samples 1 --out clip.pdf

  vjepa-fast masks mask.masks='[{strategy: tube, ratio: 0.9}]' --step 100

Exit codes: 0 done, 1 failed, 2 usage or config, 130 interrupted.
""".replace("{strategies}", "\n\n".join(f"  {row.name}: {row.doc}" for row in STRATEGIES.values()))


def masks(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to draw: a .png, .pdf or .svg.")] = Path("masks.png"),
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="How many clips of the batch to draw.")] = 3,
    step: Annotated[int, typer.Option(metavar="K", min=0, max=2**31 - 1, help="Step of the run, from 0.")] = 0,
    nproc: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes of the run, where the config gives the clips of each.")
    ] = 1,
    video: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Frames to draw on: the first clip of this video. Without it, clips that are made up."
        ),
    ] = None,
) -> None:
    """Draw the masks of a training step over frames, and print how much each mask keeps. Needs no data."""
    with exit_codes():
        cfg = load(recipe, config, list(overrides or ()))
        # Imported here: torch takes seconds, which --help need not wait for.
        from vjepa_fast.masking import picture

        if out.suffix.lower() not in picture.FORMATS:
            raise ConfigError(f"--out is {out}; expected a name that ends in {' or '.join(picture.FORMATS)}")
        global_batch = _global_batch(cfg, nproc)
        if samples > global_batch:
            raise ConfigError(f"--samples is {samples}, but a step has {global_batch} clips; draw at most as many")
        groups = _masks_of_step(cfg, step, nproc, global_batch)
        rows = sum(min(samples, group.masks.batch_size) for group in groups) * len(cfg.mask.masks)
        if rows > picture.MAX_ROWS:
            raise ConfigError(
                f"--samples {samples} makes {rows} rows, one for each mask of a clip, and a picture "
                f"holds {picture.MAX_ROWS}; ask for fewer"
            )
        panels = [_panel(cfg, group, samples, video, len(groups) > 1) for group in groups]
        name = config.name if config is not None else recipe or "demo"
        _write(
            panels,
            f"Masks of {name}, step {step}, seed {cfg.train.seed}",
            _facts(cfg, nproc, global_batch, groups),
            out,
        )
        for group in groups:
            for mask, spec in enumerate(cfg.mask.masks):
                which = f"{_frames(group.fpc)}, " if len(groups) > 1 else ""
                shares = picture.shares_text(*picture.mean_shares(group.masks, mask), group.masks.num_tokens)
                typer.echo(
                    f"{which}mask {mask} ({picture.describe(spec)}): {shares}, mean over {group.masks.batch_size} clips"
                )
        typer.echo(f"picture {out}")


class _Group(NamedTuple):
    """All clips of a step that have the same number of frames."""

    fpc: int
    sample_ids: np.ndarray
    masks: MaskBatch


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _global_batch(cfg: Config, nproc: int) -> int:
    try:
        return cfg.data.per_process(nproc) * nproc
    except ValueError as error:
        raise ConfigError(f"{error}; use another --nproc or batch size") from error


def _masks_of_step(cfg: Config, step: int, nproc: int, global_batch: int) -> list[_Group]:
    import torch

    from vjepa_fast.masking.sampler import StepMasks

    data = cfg.data
    fpcs = list(dict.fromkeys(data.dataset_fpcs))
    group_of = _group_of(cfg, fpcs)
    is_stream = cfg.mask.source == "reference"
    draw = StepMasks(
        cfg.mask,
        fpcs=fpcs,
        crop_size=data.crop_size,
        patch_size=data.patch_size,
        tubelet_size=data.tubelet_size,
        seed=cfg.train.seed,
        global_batch=global_batch,
        group_of=group_of,
        # Counters give every process the masks of its samples, so one can draw them all. The reference's stream belongs
        # to one process, and StepMasks says so where there are more.
        world_size=nproc if is_stream else 1,
    )
    groups: list[_Group] = []
    # A stream gets to a step through all steps before it.
    for one in range(0 if is_stream else step, step + 1):
        ids = np.arange(one * global_batch, (one + 1) * global_batch, dtype=np.int64)
        group_ids = group_of(ids)
        present = np.unique(group_ids).tolist()
        own = [ids[group_ids == group] for group in present]
        batches = draw(one, [torch.from_numpy(x) for x in own], present)
        groups = [_Group(fpcs[group], *pair) for group, *pair in zip(present, own, batches, strict=True)]
    return groups


def _group_of(cfg: Config, fpcs: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Which frames-per-clip group a global sample number belongs to; where there are several, the data decides."""
    data = cfg.data
    if len(fpcs) == 1:
        return np.zeros_like
    if not data.datasets:
        raise ConfigError(
            f"data.dataset_fpcs is {data.dataset_fpcs}, and the datasets decide which clips have how "
            "many frames; name them in data.datasets, or give one number, as in data.dataset_fpcs=[16]"
        )
    from vjepa_fast.data.generated.registry import GENERATED
    from vjepa_fast.data.manifest import read_manifest
    from vjepa_fast.data.sampling import choose_videos

    sizes = [GENERATED[name].num_train if name in GENERATED else len(read_manifest(name)[0]) for name in data.datasets]
    groups = np.array([fpcs.index(fpc) for fpc in data.dataset_fpcs])
    return lambda ids: groups[
        choose_videos(ids, sizes, data.datasets_weights, data.seed, data.shuffle, data.clips_per_video)[0]
    ]


def _panel(cfg: Config, group: _Group, samples: int, video: Path | None, is_one_of_many: bool) -> Panel:
    from vjepa_fast.masking import picture

    shown = min(samples, group.masks.batch_size)
    side = picture.token_size(group.masks.grid)
    size = group.masks.grid[1] * side, group.masks.grid[2] * side
    if video is not None:
        frames = [_read_clip(cfg, video, group.fpc, size)] * shown
    else:
        frames = [_made_up_clip(cfg.train.seed, clip, group.fpc, size) for clip in range(shown)]
    return picture.Panel(
        masks=group.masks.narrow(0, shown),
        names=[picture.describe(spec) for spec in cfg.mask.masks],
        sample_ids=group.sample_ids[:shown].tolist(),
        # A token frame shows the first of its frames; an image has one of both.
        frames=[clip[:: cfg.data.tubelet_size] for clip in frames],
        tubelet_size=min(cfg.data.tubelet_size, group.fpc),
        heading=f"clips of {_frames(group.fpc)}" if is_one_of_many else "",
    )


def _made_up_clip(seed: int, number: int, fpc: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [fpc, *size, 3], cut from the middle of a square."""
    from vjepa_fast.data.generated.synthetic import render

    top, left = ((max(size) - side) // 2 for side in size)
    frames, _ = render(seed, 0, number, max(size), fpc)
    return frames[:, top : top + size[0], left : left + size[1]]


def _read_clip(cfg: Config, video: Path, fpc: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [fpc, *size, 3]: the first clip of a video, the middle of its frames."""
    from vjepa_fast.data.decode.index import DecodeError, load_index
    from vjepa_fast.data.decode.pyav import decode_clip
    from vjepa_fast.data.decode.request import ClipRequest, VideoSource
    from vjepa_fast.data.sampling import Box, clip_frames, clip_step

    data = cfg.data
    try:
        index = load_index(str(video), data.cache_dir)
        step = clip_step(
            index.avg_fps,
            fpc,
            fps=data.fps,
            duration=data.duration,
            frame_step=data.frame_step,
            round_fps=data.round_fps,
        )
        # In a video as long as the clip there is one place for it, the first.
        numbers = clip_frames(0, 0, min(index.num_frames, fpc * step), fpc, step, cfg.train.seed)
        scale = min(index.height / size[0], index.width / size[1])
        height, width = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        box = Box((index.height - height) // 2, (index.width - width) // 2, height, width)
        return decode_clip(ClipRequest(VideoSource(str(video), index), numbers, box, size, flip=False)).numpy()
    except (DecodeError, ValueError) as error:
        raise UserError(f"--video {video}: {error}") from error


def _facts(cfg: Config, nproc: int, global_batch: int, groups: list[_Group]) -> list[str]:
    """What the picture says below its title."""
    from vjepa_fast.masking.picture import MAX_COLUMNS

    height, width = cfg.data.crop_size
    grids = " and ".join(
        f"{group.masks.num_tokens} = {' x '.join(map(str, group.masks.grid))} ({group.fpc} x {height} x {width} pixels)"
        for group in groups
    )
    batch = f"a step has {global_batch} clips" + (f" in {nproc} processes" if nproc > 1 else "")
    if cfg.mask.truncate == "none":
        rule = "nothing is truncated"
    elif cfg.mask.source == "reference":
        rule = "all are truncated to the shortest; drawn from the reference's random stream"
    else:
        rule = f"each is truncated to the shortest of its {cfg.mask.group_size}"
    shown = "frames shown are the first of a token"
    if any(group.masks.grid[0] > MAX_COLUMNS for group in groups):
        shown = f"{MAX_COLUMNS} of the {max(group.masks.grid[0] for group in groups)} token frames are shown"
    return [f"Tokens of a clip: {grids}; {shown}.", f"Batch: {batch}; {rule}."]


def _write(panels: list[Panel], title: str, facts: list[str], out: Path) -> None:
    from vjepa_fast.common.atomic import atomic_path
    from vjepa_fast.masking.picture import draw

    try:
        with atomic_path(out) as temporary:
            draw(panels, title, facts, temporary)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
