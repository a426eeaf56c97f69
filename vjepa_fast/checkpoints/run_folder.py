"""Chooses the run folder and finds the checkpoints in it."""

from __future__ import annotations

import re
from pathlib import Path

from vjepa_fast.common.atomic import write_text
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import Config

LATEST = "latest.pt"
LATEST_OF_V1 = "-latest.pth.tar"
"""What V-JEPA 1's training script adds to the name of a run where ours and V-JEPA 2's write latest.pt."""
SHARDS = ".dcp"
"""Ends the names of checkpoints that are folders of shards (vjepa_fast.checkpoints.sharded_format)."""
MANIFEST = "manifest.json"
"""File of such a folder that is written last."""
LAUNCHED_BY = "launched_by.txt"
"""File in the run folder that says which launch made or resumed the run."""


def previous_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """step<N>.pt files and step<N>.dcp folders with their N, the newest first."""
    names = ((re.fullmatch(rf"step(\d+)(\.pt|{re.escape(SHARDS)})", path.name), path) for path in folder.glob("step*"))
    return sorted(((int(found[1]), path) for found, path in names if found), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """latest.pt or the newest step<N>.dcp, whichever was written last; None: there is neither."""
    latest = folder / LATEST
    shards = next((path for _, path in previous_checkpoints(folder) if path.suffix == SHARDS), None)
    if shards is None or not latest.exists():
        return shards or (latest if latest.exists() else None)
    return max(latest, shards, key=written_at)


def written_at(path: Path) -> int:
    """When a checkpoint was written, in ns; a folder when it was complete, whatever names it has got since."""
    manifest = path / MANIFEST
    return (manifest if manifest.exists() else path).stat().st_mtime_ns


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from: latest.pt, one before it, or one of shards."""
    return (folder / LATEST).exists() or bool(previous_checkpoints(folder))


def choose_folder(cfg: Config, resume: bool) -> Path:
    """The run folder: `train.out`, else runs/<name>, numbered so that no earlier run is overwritten.

    Raises:
        ConfigError: a folder asked for by name already holds a run and resuming was not asked for.
        UserError: resuming was asked for and there is nothing to resume, or the folder cannot be made.
    """
    resume = resume or cfg.train.auto_resume
    if cfg.train.out is not None:
        folder = cfg.train.out
        if holds_run(folder) and not resume:
            raise ConfigError(f"{folder} already holds a run; add --resume to continue it, or choose another --out")
    else:
        used = []
        folder = Path("runs") / cfg.train.name
        while folder.exists():
            used.append(folder)
            folder = Path("runs") / f"{cfg.train.name}-{len(used) + 1}"
        resumable = [path for path in used if holds_run(path)]
        if resume and resumable:
            folder = resumable[-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from error
    return folder


def choose_folder_of_launch(cfg: Config, resume: bool, launch: str, restarted: bool) -> tuple[Path, bool]:
    """The run folder of processes that a launcher starts again by itself, and whether to continue what is there.

    Args:
        resume: the user asked to resume.
        launch: the same text for all starts of a launch.
        restarted: this is not the first start: then the folder is that of the start before, and the run goes on.

    Raises:
        ConfigError, UserError: as choose_folder.
    """
    folder = _folder_of(cfg, launch) if restarted else None
    if folder is None:
        resume = resume or (restarted and cfg.train.out is not None)
        folder = choose_folder(cfg, resume)
        write_text(folder / LAUNCHED_BY, launch + "\n")
        return folder, resume
    return folder, True


def _folder_of(cfg: Config, launch: str) -> Path | None:
    folders = [cfg.train.out] if cfg.train.out is not None else Path("runs").glob(f"{cfg.train.name}*")
    paths = [
        path for folder in folders if (path := folder / LAUNCHED_BY).is_file() and path.read_text() == launch + "\n"
    ]
    # In a container launchers may have the same number every time: the newest file is of this launch.
    return max(paths, key=lambda path: path.stat().st_mtime_ns).parent if paths else None
