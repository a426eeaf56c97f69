"""Checkpoints of every released architecture from Meta's layout into ours and back, and from Hugging Face's and back.

    python -m benchmarks.round_trips --v1 ../jepa --v2 ../vjepa2 --v21 ../vjepa21 \\
        --out benchmarks/results/round_trips_2026-11-26.md

Weights are random, names are the reference's. Names and shapes of whole models are compared on the meta device, with
all their blocks; the weights go round, and outputs are compared, with `--depth` blocks at full width.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import vjepa_fast as vf
from benchmarks.released_architectures import ARCHITECTURES, V21_DEPTHS, Architecture
from vjepa_fast.checkpoints import infer_config, meta_format
from vjepa_fast.checkpoints.export import write
from vjepa_fast.checkpoints.huggingface import weights as huggingface
from vjepa_fast.checkpoints.huggingface.config import to_hf_config
from vjepa_fast.checkpoints.open import Checkpoint, open_checkpoint
from vjepa_fast.common import markdown
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.inference import verify
from vjepa_fast.inference.loading import check_fit, model_config
from vjepa_fast.models.sizes import size_of

State = dict[str, Tensor]


@dataclass
class Row:
    """What came of one architecture."""

    name: str
    tensors: str = ""
    meta_trip: str = ""
    hf_trip: str = ""
    outputs: dict[str, float] = field(default_factory=dict)


def config_of(architecture: Architecture, **changes: Any) -> ModelConfig:
    """Its config, with other sizes where they are given."""
    return ModelConfig.model_validate({"patch_size": 16, "tubelet_size": 2, **architecture.model, **changes})


def reference_networks(cfg: ModelConfig, root: Path, action: bool = False) -> dict[str, Any]:
    """Encoder and predictor of a checkout, on the default device."""
    networks: dict[str, Any] = dict(verify.reference_modules(cfg, root))
    if action:
        with verify.importing(root):
            predictors = importlib.import_module("src.models.ac_predictor")
        assert cfg.crop_size is not None
        # Its mask of all pairs of tokens would not fit the memory at 64 frames; no parameter depends on it.
        networks["predictor"] = predictors.VisionTransformerPredictorAC(
            img_size=cfg.crop_size,
            patch_size=cfg.patch_size,
            num_frames=cfg.num_frames,
            is_frame_causal=False,
            tubelet_size=cfg.tubelet_size,
            embed_dim=size_of(cfg).embed_dim,
            depth=cfg.pred_depth,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )
    return networks


def reference_states(architecture: Architecture, root: Path) -> dict[str, State]:
    """The state dicts of the whole encoder and predictor of a checkout, on the meta device."""
    # They take numbers out of this one.
    on_cpu = mock.patch.object(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"), on_cpu:
        networks = reference_networks(config_of(architecture), root, architecture.action)
    return {name: meta_format.strip_prefixes(network.state_dict()) for name, network in networks.items()}


def compare_names(architecture: Architecture, states: Mapping[str, State]) -> str:
    """Whether a whole model is told from the names and shapes of the reference's; how many there are.

    Args:
        architecture: which.
        states: `encoder` and `predictor`, on the meta device.

    Raises:
        UserError: names or shapes differ.
    """
    cfg = config_of(architecture)
    checkpoint = Checkpoint(Path(architecture.name), "meta", {architecture.key: states["encoder"]})
    if architecture.action:
        checkpoint.action_predictor = states["predictor"]
    else:
        checkpoint.predictor = states["predictor"]
    found, _ = model_config(checkpoint, architecture.key, {})
    # Fits, or raises with the differences.
    check_fit(checkpoint, architecture.key, found)
    # Neither shapes nor names tell the crop and the frames of a model with RoPE; nothing depends on them.
    names = {
        "model_name",
        "use_rope",
        "rope_style",
        "interpolate_rope",
        "uniform_power",
        "n_output_distillation",
        "teacher_embed_dim",
        *(() if cfg.use_rope else ("crop_size", "num_frames")),
    }
    for name in names:
        assert getattr(cfg, name) == getattr(found, name), name
    if not architecture.action:
        heads = size_of(cfg).num_heads
        assert (cfg.pred_num_heads or heads) == (found.pred_num_heads or heads)
    parameters = sum(value.numel() for state in states.values() for value in state.values())
    return f"{sum(map(len, states.values()))} of {parameters / 1e6:.0f} M"


def compare_hf_names(architecture: Architecture, states: Mapping[str, State]) -> None:
    """Whether the whole model has the names and shapes of transformers' under transformers' names.

    Raises:
        UserError: it has not.
    """
    import transformers

    config = {
        key: value
        for key, value in to_hf_config(config_of(architecture), predictor=not architecture.action).items()
        if key not in ("model_type", "architectures")
    }
    with torch.device("meta"):
        theirs = transformers.VJEPA2Model(transformers.VJEPA2Config(**config)).state_dict()
    if architecture.action:
        ours = huggingface.encoder_to_hf(states["encoder"])
        theirs = {key: value for key, value in theirs.items() if key.startswith("encoder.")}
    else:
        ours = huggingface.to_hf(states["encoder"], states["predictor"])
    if differences := infer_config.differences(theirs, ours):
        raise UserError(f"{architecture.name} differs from transformers' model: {differences}")


def randomise(module: nn.Module, seed: int) -> None:
    """Weights like those of a trained model, in no way special; position tables stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith("pos_embed"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.05 * noise)
            else:
                value.copy_(noise * (0.5 if value.shape[0] == 1 else value[0].numel() ** -0.5))


def write_metas(architecture: Architecture, cfg: ModelConfig, root: Path, path: Path) -> None:
    """A checkpoint as the reference writes it, of its own modules with random weights."""
    networks = reference_networks(cfg, root, architecture.action)
    contents: dict[str, Any] = {"epoch": 1}
    prefix = "module." if architecture.action else meta_format.PREFIX
    for seed, key in enumerate(("encoder", architecture.key, "predictor")):
        network = networks["predictor" if key == "predictor" else "encoder"]
        network = getattr(network, "module", network)
        randomise(network, seed)
        contents[key] = {prefix + name: value.clone() for name, value in network.state_dict().items()}
    if architecture.heads is not None:
        depth = 1 if architecture.version == "v1" else 4
        probe = verify.reference_probe(root, size_of(cfg).embed_dim, _heads(architecture, cfg), 10, depth)
        randomise(probe, 3)
        contents["classifiers"] = [{f"module.{name}": value for name, value in probe.state_dict().items()}]
    torch.save(contents, path)


def _heads(architecture: Architecture, cfg: ModelConfig) -> int:
    heads = architecture.heads or 1
    return heads if size_of(cfg).embed_dim % heads == 0 else size_of(cfg).num_heads


def meta_trip(
    architecture: Architecture, cfg: ModelConfig, root: Path, folder: Path
) -> tuple[Checkpoint, dict[str, float]]:
    """Meta -> ours -> Meta. Weights must be equal to the bit.

    Returns:
        What was read at first, and the largest relative difference of each output of what came back, run here and by
        the reference's modules.

    Raises:
        UserError: a weight changed on the way.
    """
    first, ours, back = folder / "meta.pt", folder / "ours.safetensors", folder / "back.pt"
    write_metas(architecture, cfg, root, first)
    start = open_checkpoint(first)
    overrides = {
        name: getattr(cfg, name)
        for name in ("num_heads", "pred_num_heads", "crop_size", "num_frames")
        if getattr(cfg, name) is not None
    }
    found, _ = model_config(start, architecture.key, overrides)
    check_fit(start, architecture.key, found)
    write(start, found, architecture.key, ours, "fast", heads=_heads(architecture, cfg))
    middle = open_checkpoint(ours)
    write(middle, build_config(middle), architecture.key, back, "meta")
    end = open_checkpoint(back)
    compare(start, end, architecture.key)
    return start, verify.against_meta(back, root)


def hf_trip(cfg: ModelConfig, start: Checkpoint, key: str, heads: int, folder: Path) -> dict[str, float]:
    """Hugging Face -> ours -> Hugging Face, beginning with what transformers itself saves; without a predictor, of
    which it would make a random one, with what we write.

    Raises:
        UserError: transformers has no such model, or a weight changed on the way.
    """
    import transformers

    saved = write(start, cfg, key, folder / "made_hf", "hf", heads=heads)
    if start.predictor is not None:
        kind = transformers.VJEPA2ForVideoClassification if start.classifiers else transformers.VJEPA2Model
        kind.from_pretrained(saved).save_pretrained(folder / "first_hf")
        saved = folder / "first_hf"
    first = open_checkpoint(saved)
    ours = write(first, build_config(first), "encoder", folder / "hf.safetensors", "fast")
    middle = open_checkpoint(ours)
    back = write(middle, build_config(middle), "encoder", folder / "back_hf", "hf")
    compare(first, open_checkpoint(back), "encoder")
    verify.assert_same_bits("encoder", start.encoders[key], first.encoders["encoder"])
    return verify.against_hf(back)


def build_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config that a checkpoint itself says."""
    found, assumed = model_config(checkpoint, checkpoint.choose(), {})
    assert checkpoint.action_predictor is not None or not assumed, assumed
    return found


def compare(start: Checkpoint, end: Checkpoint, key: str) -> None:
    """Raises UserError unless encoder, predictors and probes are equal to the bit."""
    pairs = [
        ("encoder", start.encoders[key], end.encoders[key]),
        ("predictor", start.predictor, end.predictor),
        ("action predictor", start.action_predictor, end.action_predictor),
        *(("probe", *both) for both in zip(start.classifiers, end.classifiers, strict=True)),
    ]
    for name, before, after in pairs:
        verify.assert_same_bits(name, before or {}, after or {})


def run(architecture: Architecture, root: Path, depth: int | None, **sizes: Any) -> Row:
    """Everything about one architecture.

    Args:
        architecture: which.
        root: the checkout of its version.
        depth: blocks of encoder and predictor whose weights go round; None: all.
        sizes: fields of ModelConfig for smaller models, in tests.
    """
    row = Row(architecture.name)
    states = reference_states(architecture, root)
    row.tensors = compare_names(architecture, states)
    if architecture.version == "v2":
        compare_hf_names(architecture, states)
    changes = {}
    if depth is not None:
        changes = {"depth": depth, "pred_depth": depth} if architecture.version != "v2.1" else V21_DEPTHS
    cfg = config_of(architecture, **changes, **sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start, outputs = meta_trip(architecture, cfg, root, folder)
        row.meta_trip = "equal to the bit"
        row.outputs = {f"Meta's {key}": value for key, value in outputs.items()}
        heads = _heads(architecture, cfg)
        if start.classifiers and heads != size_of(cfg).num_heads:
            # Whose probes have another number of heads than the encoder; transformers has one number for both.
            start.classifiers = []
        try:
            found = hf_trip(cfg, start, architecture.key, heads, folder)
            row.hf_trip = "equal to the bit" + (
                ""
                if start.classifiers or architecture.heads is None
                else ", without probe (16 heads, the encoder has others)"
            )
            row.outputs |= {f"transformers' {key}": value for key, value in found.items()}
        except UserError as error:
            row.hf_trip = f"refused: {str(error).partition(': ')[2]}"
    return row


def to_markdown(rows: Iterable[Row], depth: int | None, command: str) -> str:
    lines = [
        "# Checkpoints there and back",
        "",
        f"Command: `{command}`",
        "",
        f"torch {torch.__version__}, vjepa-fast {vf.__version__}; {time.strftime('%Y-%m-%d')}",
        "",
        "Random weights under the reference's names. `tensors`: names and shapes of encoder and predictor with all "
        f"their blocks, on the meta device. The weights that went round have {depth or 'all'} blocks (V-JEPA 2.1: 12 "
        "in the encoder, 4 in the predictor) at full width. Outputs: norm of the difference over norm, of features and "
        "predictions of one random clip, fp32.",
        "",
        *markdown.table(
            ["model", "tensors, parameters", "Meta -> ours -> Meta", "Hugging Face -> ours -> Hugging Face", "outputs"],
            [
                [
                    row.name,
                    row.tensors,
                    row.meta_trip,
                    row.hf_trip,
                    ", ".join(f"{key} {value:.0e}" for key, value in row.outputs.items()),
                ]
                for row in rows
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v1", type=Path, required=True, help="checkout of facebookresearch/jepa")
    parser.add_argument("--v2", type=Path, required=True, help="checkout of facebookresearch/vjepa2")
    parser.add_argument("--v21", type=Path, help="checkout of facebookresearch/vjepa2 with app/vjepa_2_1")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--only", help="architectures whose name contains this")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    roots = {"v1": args.v1, "v2": args.v2, "v2.1": args.v21}
    rows = []
    for architecture in ARCHITECTURES:
        root = roots[architecture.version]
        if root is None or args.only is not None and args.only not in architecture.name:
            continue
        rows.append(run(architecture, root, args.depth))
        print(rows[-1], flush=True)
    checkouts = " ".join(f"--{key.replace('.', '')} ../{root.name}" for key, root in roots.items() if root is not None)
    args.out.write_text(
        to_markdown(
            rows, args.depth, f"python -m benchmarks.round_trips {checkouts} --depth {args.depth} --out {args.out}"
        )
    )


if __name__ == "__main__":
    main()
