"""The code behind the table of round trips, at small width; names and shapes are those of the released models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import round_trips
from benchmarks.round_trips import ARCHITECTURES, Architecture
from tests.checkpoints import released_names
from vjepa_fast.common.errors import UserError

ROOTS = {"v1": "VJEPA1_REFERENCE", "v2": "VJEPA2_REFERENCE", "v2.1": "VJEPA21_REFERENCE"}
SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "num_heads": 16,
    "pred_embed_dim": 48,
    "pred_num_heads": 3,
    "mlp_ratio": 4.0,
    "num_frames": 4,
    "crop_size": 64,
}
SOME = ("V-JEPA ViT-L/16", "V-JEPA 2 ViT-L/16", "V-JEPA 2-AC ViT-g/16", "V-JEPA 2.1 ViT-B/16")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_released_models_are_told_from_names_and_shapes(architecture: Architecture) -> None:
    """Without a checkout, from a file of its names."""
    states = released_names.load()[architecture.name]
    count, size = round_trips.compare_names(architecture, states).split(" of ")
    assert int(count) == sum(map(len, states.values())) > 300 and int(size.split()[0]) > 100
    if architecture.version == "v2":
        pytest.importorskip("transformers")
        round_trips.compare_hf_names(architecture, states)
    del states["encoder"]["blocks.1.mlp.fc1.bias"]
    with pytest.raises(UserError, match=r"missing blocks\.1\.mlp\.fc1\.bias"):
        round_trips.compare_names(architecture, states)


@pytest.mark.parametrize("name", SOME)
def test_the_file_of_names_is_the_references(name: str) -> None:
    [architecture] = [one for one in ARCHITECTURES if one.name == name]
    root = os.environ.get(ROOTS[architecture.version])
    if not root:
        pytest.skip(f"{ROOTS[architecture.version]} does not name a checkout of the reference")
    for part, state in round_trips.reference_states(architecture, Path(root)).items():
        kept = released_names.load()[name][part]
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in kept.items()}


@pytest.mark.parametrize("name", SOME)
def test_there_and_back(name: str) -> None:
    [architecture] = [one for one in ARCHITECTURES if one.name == name]
    root = os.environ.get(ROOTS[architecture.version])
    if not root:
        pytest.skip(f"{ROOTS[architecture.version]} does not name a checkout of the reference")
    sizes = SMALL | ({"teacher_embed_dim": 112} if "teacher_embed_dim" in architecture.model else {})
    row = round_trips.run(architecture, Path(root), 2, **sizes)
    assert row.meta_trip == "equal to the bit"
    assert all(value <= 1e-5 for value in row.outputs.values())
    expected = {"Meta's encoder"} | ({"Meta's predictor"} if not architecture.action else set())
    if architecture.heads is not None:
        expected.add("Meta's classifier 0")
    if architecture.version == "v2":
        assert row.hf_trip == "equal to the bit"
        expected |= {one.replace("Meta's", "transformers'").removesuffix(" 0") for one in expected}
    else:
        assert row.hf_trip.startswith("refused: it has")
    assert set(row.outputs) == expected


def test_a_changed_weight_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.environ.get("VJEPA2_REFERENCE")
    if not root:
        pytest.skip("VJEPA2_REFERENCE does not name a checkout of the reference")
    small = Architecture("small", "v2", {**ARCHITECTURES[3].model, **SMALL}, heads=None)
    opened = round_trips.open_checkpoint

    def damaged(path: Path) -> Any:
        found = opened(path)
        if "back" in str(path):
            key = found.choose()
            found.encoders[key] = found.encoders[key] | {"norm.bias": found.encoders[key]["norm.bias"] + 1e-6}
        return found

    monkeypatch.setattr(round_trips, "open_checkpoint", damaged)
    with pytest.raises(UserError, match="the encoder that was written is not the one that was read: norm.bias"):
        round_trips.meta_trip(small, round_trips.config_of(small, depth=2, pred_depth=2), Path(root), tmp_path)
