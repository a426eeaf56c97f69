"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError, UserError

LATEST = "latest.pt"


def choose_folder(cfg: Config, resume: bool) -> Path:
    """The run folder: `train.out`, else runs/<name>, numbered so that no earlier run is overwritten.

    Raises:
        ConfigError: a folder asked for by name already holds a run and resuming was not asked for.
        UserError: resuming was asked for and there is nothing to resume, or the folder cannot be made.
    """
    resume = resume or cfg.train.auto_resume
    if cfg.train.out is not None:
        folder = cfg.train.out
        if (folder / LATEST).exists() and not resume:
            raise ConfigError(f"{folder} already holds a run; add --resume to continue it, or choose another --out")
    else:
        used = []
        folder = Path("runs") / cfg.train.name
        while folder.exists():
            used.append(folder)
            folder = Path("runs") / f"{cfg.train.name}-{len(used) + 1}"
        resumable = [path for path in used if (path / LATEST).exists()]
        if resume and resumable:
            folder = resumable[-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from error
    return folder
