"""What the golden files hold and how it is computed from a run; the same for the reference's runs and ours."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from .cases import uniform
from .mask_cases import Masks

FOLDER = Path(__file__).parent / "golden"
NUM_MASK_BATCHES = 20


def summary(name: str, value: torch.Tensor) -> list[float]:
    """[norm, product with a fixed random tensor of variance 1]: the second sees signs and places, the first scale."""
    value = value.double()
    return [value.norm().item(), (value * uniform(f"projection/{name}", value.shape)).sum().item()]


def mask_hash(masks: Masks) -> str:
    """SHA-256 over the groups of one batch: frames per clip, then shape and little-endian int64 ids of every mask."""
    digest = hashlib.sha256()
    for fpc, (enc, pred) in masks.items():
        digest.update(f"fpc {fpc};".encode())
        for role, tensors in (("context", enc), ("target", pred)):
            for ids in tensors:
                digest.update(f"{role} {list(ids.shape)};".encode())
                digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def write(name: str, content: dict[str, Any]) -> Path:
    """Write golden/<name>.json, lists of numbers on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    path = FOLDER / f"{name}.json"
    path.write_text(text + "\n", encoding="ascii")
    return path


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="ascii"))
