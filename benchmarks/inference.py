"""Inference against training and against Hugging Face's VJEPA2Model.

    python -m benchmarks.inference --out benchmarks/results/inference_cpu_2026-11-26
    python -m benchmarks.inference --models vit_large --batch 8 --dtype bfloat16 --out ...    (on a GPU)

Memory: parameters in memory, and by how much a process of its own grows that only loads and encodes a batch, or trains
two steps. On a CPU that counts the pages of the checkpoint that are read, which the system may drop.
Speed: encoder clips/s, the contestants one after another in every round, medians of the rounds' times and of their
ratios. On a GPU, and with --compile, both also run compiled: transformers as a whole, ours the parts of a block around
attention (model.compile_model).
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vjepa_fast as vf
from vjepa_fast.checkpoints.export import write
from vjepa_fast.checkpoints.huggingface import weights as huggingface
from vjepa_fast.checkpoints.huggingface.config import to_hf_config
from vjepa_fast.checkpoints.open import Checkpoint
from vjepa_fast.common import markdown
from vjepa_fast.common.hardware import cpu_name
from vjepa_fast.config.schema import Config
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.models.layers import set_compiled
from vjepa_fast.ops.patch_embed import normalise

OURS = ("ours", "ours compiled")


def config(model: str, crop: int, frames: int, dtype: str = "float32") -> Config:
    return Config.model_validate(
        {
            "model": {"model_name": model, "pred_num_heads": 12, "num_mask_tokens": 10},
            "data": {"crop_size": crop, "dataset_fpcs": [frames], "batch_size": 1, "datasets": ["synthetic:8"]},
            "train": {"dtype": dtype},
        }
    )


def clip(batch: int, crop: int, frames: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, frames, crop, crop, 3), dtype=torch.uint8, generator=generator).to(device)


def memory_bytes(device: torch.device, entry: str) -> int:
    """VmRSS (now) or VmHWM (at its highest); on a GPU what torch has allocated at its highest."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(entry)


def _infer(path: str, args: argparse.Namespace, crop: int) -> dict[str, float]:
    device = torch.device(args.device)
    before = memory_bytes(device, "VmRSS")
    model = vf.load(path, device=device, dtype=args.dtype, predictor=False)
    model.encode(clip(args.batch, crop, args.frames, device))
    return {"parameters": sum(p.numel() for p in model.parameters()), "peak": memory_bytes(device, "VmHWM") - before}


def _train(name: str, args: argparse.Namespace, crop: int) -> dict[str, float]:
    from vjepa_fast.train.step import TrainStep

    device = torch.device(args.device)
    before = memory_bytes(device, "VmRSS")
    cfg = config(name, crop, args.frames, args.dtype)
    with device:
        model = vf.VJEPA.from_config(cfg)
    step = TrainStep(model, cfg)
    sampler = vf.MaskSampler(cfg.mask, grid=model.encoder.grid, seed=0)
    for number in range(2):
        masks = sampler(number, range(args.batch), device)
        step(number, [clip(args.batch, crop, args.frames, device)], [masks])
    return {"parameters": sum(p.numel() for p in model.parameters()), "peak": memory_bytes(device, "VmHWM") - before}


def apart(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """In a process of its own, whose peak nothing else has raised."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measure_memory(name: str, args: argparse.Namespace, crop: int) -> dict[str, Any]:
    cfg = config(name, crop, args.frames).model
    torch.manual_seed(0)
    model = vf.VJEPA(cfg)
    states = {key: getattr(model, key).state_dict() for key in ("target_encoder", "encoder")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder), "meta", states, model.predictor.state_dict())
        path = write(checkpoint, cfg, "target_encoder", Path(folder) / "model.pt", "meta")
        del model, states, checkpoint
        return {"inference": apart(_infer, str(path), args, crop), "training": apart(_train, name, args, crop)}


def measure_speed(name: str, args: argparse.Namespace, crop: int) -> dict[str, Any]:
    import transformers

    device, kind = torch.device(args.device), getattr(torch, args.dtype)
    cfg = config(name, crop, args.frames).model.model_copy(update={"dtype": args.dtype})
    torch.manual_seed(0)
    encoder = vf.VJEPA(cfg).encoder
    hf_config = transformers.VJEPA2Config(
        **{key: value for key, value in to_hf_config(cfg).items() if key not in ("model_type", "architectures")}
    )
    theirs = transformers.VJEPA2Model(hf_config)
    theirs.encoder.load_state_dict(
        {key.removeprefix("encoder."): value for key, value in huggingface.encoder_to_hf(encoder.state_dict()).items()}
    )
    theirs = theirs.encoder.to(device, kind).eval().requires_grad_(False)
    ours = InferenceModel(encoder.to(device, kind), None)
    clips = clip(args.batch, crop, args.frames, device)
    pixels = normalise(clips, kind).permute(0, 1, 4, 2, 3).contiguous()
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours.encode(clips),
        "transformers": lambda: theirs(pixels).last_hidden_state,
    }
    if device.type == "cuda" or args.compile:
        compiled, own = torch.compile(theirs), InferenceModel(copy.deepcopy(encoder), None)
        set_compiled(own.encoder, True)
        contestants["ours compiled"] = lambda: own.encode(clips)
        contestants["transformers compiled"] = lambda: compiled(pixels).last_hidden_state
    with torch.no_grad():
        outputs = {key: run().float() for key, run in contestants.items()}
        times: dict[str, list[float]] = {key: [] for key in contestants}
        for _ in range(args.rounds):
            for key, run in contestants.items():
                _wait(device)
                start = time.perf_counter()
                for _ in range(args.repeat):
                    run()
                _wait(device)
                times[key].append((time.perf_counter() - start) / args.repeat)
    result: dict[str, Any] = {
        key: {"clips_per_s": args.batch / statistics.median(values), "times": values} for key, values in times.items()
    }
    for mine in OURS:
        for key in contestants:
            if mine in times and key not in OURS:
                ratios = [other / own for own, other in zip(times[mine], times[key], strict=True)]
                result[f"{mine} / {key}"] = statistics.median(ratios)
    difference = (outputs["ours"] - outputs["transformers"]).norm() / outputs["transformers"].norm()
    return result | {"relative difference of outputs": float(difference)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Inference: memory, and speed beside Hugging Face's VJEPA2Model",
        "",
        f"Command: `{report['command']}`",
        "",
        f"{report['hardware']}; {report['versions']}; {report['date']}",
        "",
    ]
    memory = [
        [
            entry["name"],
            entry["clip"],
            *(
                f"{part['parameters'] / 1e6:.0f} M, {part['peak'] / 2**30:.2f} GiB"
                for part in (entry["memory"]["inference"], entry["memory"]["training"])
            ),
        ]
        for entry in report["models"]
        if "memory" in entry
    ]
    speeds = []
    for entry in report["models"]:
        speed = entry.get("speed", {})
        for key, value in speed.items():
            if isinstance(value, dict):
                ratios = [f"{speed[pair]:.2f}x" if (pair := f"{mine} / {key}") in speed else "" for mine in OURS]
                speeds.append([entry["name"], entry["clip"], key, f"{value['clips_per_s']:.3g}", *ratios])
    lines += markdown.table(
        ["model", "clip", "memory of inference: parameters, peak", "of training: parameters, peak"], memory
    )
    lines += [
        "",
        *markdown.table(["model", "clip", "who", "clips/s", "ours is faster by", "ours compiled is faster by"], speeds),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base:224", "vit_large:256"], help="name or name:pixels")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="run both compiled on a CPU too")
    parser.add_argument("--only", choices=["memory", "speed"])
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    import transformers

    device = torch.device(args.device)
    hardware = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else (f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {cpu_name()}")
    )
    flags = [
        f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in vars(args).items()
        if value not in (None, False)
    ]
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.inference {' '.join(flags)}",
        "hardware": hardware,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, vjepa-fast {vf.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "models": [],
    }
    for text in args.models:
        name, _, crop = text.partition(":")
        pixels = int(crop or 256)
        entry: dict[str, Any] = {"name": name, "clip": f"{args.batch} x {args.frames} x {pixels} px, {args.dtype}"}
        if args.only != "speed":
            entry["memory"] = measure_memory(name, args, pixels)
        if args.only != "memory":
            entry["speed"] = measure_speed(name, args, pixels)
        report["models"].append(entry)
        print(json.dumps({key: value for key, value in entry.items()}, default=str)[:2000], flush=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(to_markdown(report))


if __name__ == "__main__":
    main()
