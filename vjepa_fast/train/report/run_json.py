"""run.json in the run folder: when a run started and resumed, on what, and how it ended.

A list with an entry for every start since step 0, the last one last. Training does not read it.
"""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vjepa_fast import __version__
from vjepa_fast.common.atomic import write_text
from vjepa_fast.common.hardware import cpu_name

RECORD = "run.json"


def begin(folder: Path, step: int, device: str, about: dict[str, Any]) -> None:
    """Add a start.

    Args:
        folder: run folder.
        step: steps done before; at 0 whatever an earlier run left is dropped, as the log does.
        device: cpu or cuda, of this process.
        about: more about it, JSON.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    import torch

    versions = {"vjepa_fast": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        hardware = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        versions["CUDA"] = str(torch.version.cuda)
    else:
        threads = torch.get_num_threads()
        hardware = f"{cpu_name()}, {threads} {'thread' if threads == 1 else 'threads'}"
    start = {"began": _now(), "from_step": step, "hardware": hardware, "versions": versions, **about}
    _write(folder, [*(read(folder) if step > 0 else []), start])


def end(folder: Path, step: int, how: str) -> None:
    """Say of the last start how it ended.

    Args:
        folder: run folder.
        step: steps done.
        how: for people.

    Raises:
        UserError: as begin.
    """
    starts = read(folder)
    if starts:
        starts[-1] |= {"ended": _now(), "to_step": step, "how": how}
        _write(folder, starts)


def read(folder: Path) -> list[dict[str, Any]]:
    """The starts; none where there is no such file, or not this file."""
    try:
        starts = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _write(folder: Path, starts: list[dict[str, Any]]) -> None:
    write_text(folder / RECORD, json.dumps(starts, indent=1) + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
