"""Single operations on the CPU, our PyTorch paths beside what the reference does for the same result.

    VJEPA2_REFERENCE=<checkout of facebookresearch/vjepa2> python -m benchmarks.compare_ops [--rounds N] [--threads N]

ViT-S at 128 px, 4 x 8 x 8 tokens, 4 clips, both masks; fp32; forward and backward; in turns. Where the reference has a
module for it, that module runs; else the lines of its training loop. Results agree to 1e-5 or nothing is timed. They
go to benchmarks/results/ops_vs_reference_cpu_<date>.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vjepa_fast as vf
from vjepa_fast.bench.timing import ROOT, Quantiles, environment
from vjepa_fast.bench.workload import SMALL, Workload
from vjepa_fast.common import markdown
from vjepa_fast.ops.activation import gelu, swiglu
from vjepa_fast.ops.latent_loss import latent_loss
from vjepa_fast.ops.layer_norm import LayerNorm
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.patch_embed import patch_embed
from vjepa_fast.ops.rope3d import Rope
from vjepa_fast.ops.variance_loss import variance_loss
from vjepa_fast.optim.adamw_ema import ema_update, parameter_groups

Run = Callable[[], list[Tensor]]
"""Does the operation and returns results that the other side's must equal."""
Pair = tuple[Run, Run]


def _gradients(outputs: list[Tensor], leaves: list[Tensor], upstream: list[Tensor] | None = None) -> list[Tensor]:
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


class Operations:
    """Each public method gives one operation: ours, then the reference's."""

    def __init__(self, workload: Workload) -> None:
        from tests.parity import reference_v2

        self.theirs = reference_v2.modules()
        self.normalise = reference_v2.normalise
        self.workload = workload
        self.device = torch.device("cpu")
        self.masks = workload.masks(self.device)
        self.meta_enc, self.meta_pred = self.masks.to_meta()
        self.g = torch.Generator().manual_seed(0)

    def _randn(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=self.g).requires_grad_(grad)

    def _dense(self, packed: Tensor, ids: list[Tensor]) -> list[Tensor]:
        """[B, K, ...] of each mask."""
        parts = packed.split([m.numel() for m in ids])
        return [part.view(*m.shape, -1) for part, m in zip(parts, ids, strict=True)]

    def patch_embedding(self) -> Pair:
        """Context tokens of both masks from uint8 clips."""
        data, width = self.workload.config.data, self.workload.width
        theirs = self.theirs.vit.PatchEmbed3D(
            patch_size=data.patch_size, tubelet_size=data.tubelet_size, embed_dim=width
        )
        clips = self.workload.clips(self.device)
        weight, bias = theirs.proj.weight, theirs.proj.bias
        grad = self._randn(len(self.masks.context_ids), width, grad=False)

        def ours() -> list[Tensor]:
            out = patch_embed(clips, weight, bias, self.masks.context_rows, torch.float32)
            return _gradients([out], [weight, bias], [grad])

        def reference() -> list[Tensor]:
            # Clips come to its step as normalised floats; every mask embeds all tokens and drops most.
            pixels = self.normalise(clips, torch.float32)
            out = torch.cat(
                [self.theirs.mask_utils.apply_masks(theirs(pixels), [m]).flatten(0, 1) for m in self.meta_enc]
            )
            return _gradients([out], [weight, bias], [grad])

        return ours, reference

    def rope(self) -> Pair:
        """Queries and keys of the context of both masks in 12 layers, tables included."""
        heads, width, layers = self.workload.num_heads, self.workload.width, 12
        head_dim = width // heads
        size = 2 * ((head_dim // 3) // 2)
        grid, ids = self.workload.grid, self.masks.context_ids
        qkv = self._randn(len(ids), 3 * width)
        grad = self._randn(len(ids), 3 * width, grad=False)

        def ours() -> list[Tensor]:
            rope = Rope(ids, grid, head_dim, torch.float32)
            for _ in range(layers):
                out = _gradients([rope(qkv * 1, heads)], [qkv], [grad])
            return out

        def turned(x: Tensor, positions: list[Tensor]) -> Tensor:
            rotate = self.theirs.vit.Block.__init__.__globals__["RoPEAttention"].forward.__globals__[
                "rotate_queries_or_keys"
            ]
            parts = [rotate(x[..., i * size : (i + 1) * size], pos=p) for i, p in enumerate(positions)]
            return torch.cat([*parts, x[..., 3 * size :]], dim=-1)

        def reference() -> list[Tensor]:
            for _ in range(layers):
                copied = qkv * 1
                rows = []
                for part, chosen in zip(self._dense(copied, self.meta_enc), self.meta_enc, strict=True):
                    q, k, v = part.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
                    token = chosen[:, None].repeat(1, heads, 1)
                    inside = token % (grid[1] * grid[2])
                    places = [token // (grid[1] * grid[2]), inside // grid[2], inside % grid[2]]
                    rows.append(
                        torch.stack([turned(q, places), turned(k, places), v])
                        .permute(1, 3, 0, 2, 4)
                        .reshape(token.shape[0] * token.shape[2], 3 * width)
                    )
                out = _gradients([torch.cat(rows)], [qkv], [grad])
            return out

        return ours, reference

    def add_and_norm(self) -> Pair:
        """Residual add and layer norm of the context tokens."""
        shape = len(self.masks.context_ids), self.workload.width
        norm = LayerNorm(shape[1], eps=1e-6)
        x, branch, grad = self._randn(*shape), self._randn(*shape), self._randn(*shape, grad=False)
        leaves = [x, branch, norm.weight, norm.bias]

        def ours() -> list[Tensor]:
            total, y = norm.add(x, branch)
            return _gradients([total, y], leaves, [grad, grad])

        def reference() -> list[Tensor]:
            total = x + branch
            return _gradients([total, nn.LayerNorm.forward(norm, total)], leaves, [grad, grad])

        return ours, reference

    def gelu(self) -> Pair:
        """Of the hidden layer of an MLP."""
        shape = len(self.masks.context_ids), 4 * self.workload.width
        x, grad = self._randn(*shape), self._randn(*shape, grad=False)
        return (lambda: _gradients([gelu(x)], [x], [grad])), (lambda: _gradients([F.gelu(x)], [x], [grad]))

    def swiglu(self) -> Pair:
        """Of the hidden layer of a SwiGLU MLP."""
        shape = len(self.masks.context_ids), 4 * self.workload.width
        gate, value, grad = self._randn(*shape), self._randn(*shape), self._randn(*shape, grad=False)
        return (
            (lambda: _gradients([swiglu(gate, value)], [gate, value], [grad])),
            (lambda: _gradients([F.silu(gate) * value], [gate, value], [grad])),
        )

    def loss(self) -> Pair:
        """Final norm of the target encoder, target norm, gather, distance, mean over masks."""
        width, masks = self.workload.width, self.masks
        norm = nn.LayerNorm(width, eps=1e-6).requires_grad_(False)
        features = self._randn(masks.batch_size * masks.num_tokens, width, grad=False)
        predictions = self._randn(len(masks.target_ids), width)
        weights = masks.token_weights(1)

        def ours() -> list[Tensor]:
            loss = latent_loss(
                predictions, features, weights, 1.0, masks.target_rows, (norm.weight, norm.bias, norm.eps)
            )
            return _gradients([loss], [predictions])

        def reference() -> list[Tensor]:
            with torch.no_grad():
                h = norm(features.view(masks.batch_size, masks.num_tokens, width))
                h = F.layer_norm(h, (width,))
                wanted = self.theirs.mask_utils.apply_masks(h, self.meta_pred, concat=False)
            terms = [
                torch.mean(torch.abs(z - t) ** 1.0) / 1.0
                for z, t in zip(self._dense(predictions, self.meta_pred), wanted, strict=True)
            ]
            return _gradients([sum(terms[1:], terms[0]) / len(terms)], [predictions])

        return ours, reference

    def variance_term(self) -> Pair:
        """V-JEPA 1's regulariser."""
        width, masks = self.workload.width, self.masks
        predictions = self._randn(len(masks.target_ids), width)
        packing = Packing(masks.target_lengths, masks.cu_seqlens_target)
        weights = torch.full((masks.batch_size,), 1.0 / masks.batch_size)

        def ours() -> list[Tensor]:
            return _gradients([variance_loss(predictions, packing, weights)], [predictions])

        def reference() -> list[Tensor]:
            dense = self._dense(predictions, self.meta_pred)
            spread = sum(torch.sqrt(z.var(dim=1) + 0.0001) for z in dense) / len(dense)
            return _gradients([torch.mean(F.relu(1.0 - spread))], [predictions])

        return ours, reference

    def _models(self) -> tuple[vf.VJEPA, vf.VJEPA]:
        model = self.workload.model(self.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=self.g)
        other = copy.deepcopy(model)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            b.grad = a.grad
        return model, other

    def moving_average(self) -> Pair:
        """Of the target encoder."""
        one, two = self._models()

        def ours() -> list[Tensor]:
            ema_update(one.target_encoder, one.encoder, 0.999)
            return [one.target_encoder.norm.weight]

        def reference() -> list[Tensor]:
            with torch.no_grad():
                moved, followed = [], []
                for k, q in zip(two.target_encoder.parameters(), two.encoder.parameters(), strict=True):
                    moved.append(k)
                    followed.append(q)
                torch._foreach_mul_(moved, 0.999)
                torch._foreach_add_(moved, followed, alpha=1 - 0.999)
            return [two.target_encoder.norm.weight]

        return ours, reference

    def optimizer_step(self) -> Pair:
        """Gradient norm, AdamW and moving average; the reference has no norm."""
        one, two = self._models()
        optimizer = vf.AdamWEMA(one, lr=1e-4)
        theirs = torch.optim.AdamW(parameter_groups(two.encoder, two.predictor), lr=1e-4, weight_decay=0.04)

        def ours() -> list[Tensor]:
            optimizer.step()
            return [one.encoder.norm.weight, one.target_encoder.norm.bias]

        def reference() -> list[Tensor]:
            theirs.step()
            with torch.no_grad():
                moved = list(two.target_encoder.parameters())
                torch._foreach_mul_(moved, 0.99925)
                torch._foreach_add_(moved, list(two.encoder.parameters()), alpha=1 - 0.99925)
            return [two.encoder.norm.weight, two.target_encoder.norm.bias]

        return ours, reference


NAMES = tuple(name for name in vars(Operations) if not name.startswith("_"))


def check_same(name: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Refuse to time what does not compute the same thing.

    Raises:
        ArithmeticError: results that differ by more than 1e-5 of their norm.
    """
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not (a - b).norm() <= 1e-5 * b.norm():
            raise ArithmeticError(f"{name}: result {number} differs by {float((a - b).norm() / b.norm()):.2g}")


def measure(name: str, pair: Pair, rounds: int) -> dict[str, Any]:
    """Seconds of both sides in turns, and the reference's over ours, turn by turn."""
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for turn in range(rounds + 2):
        found = []
        for side, run in zip(seconds, pair, strict=True):
            began = time.perf_counter()
            found.append(run())
            if turn >= 2:
                seconds[side].append(time.perf_counter() - began)
        if turn == 0:
            check_same(name, *found)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["reference"], strict=True)]
    return {side: asdict(Quantiles.of(times)) | {"fastest": min(times)} for side, times in seconds.items()} | {
        "ratio": asdict(Quantiles.of(ratios)),
        "ratio_of_fastest": min(seconds["reference"]) / min(seconds["ours"]),
    }


def as_markdown(about: dict[str, Any], rounds: int, found: dict[str, Any]) -> str:
    lines = [
        f"# Operations beside the reference's, on a CPU, {about['date'][:10]}",
        "",
        f"{about['device']}, torch {about['torch']}, load average {about['load_average']:.2f}, commit "
        f"{about['commit']}. {SMALL.name}, {SMALL.batch_size} clips, fp32, forward and backward, {rounds} turns. "
        f"Command: `{about['command']}`.",
        "",
    ]
    rows = []
    for name, info in found.items():
        ratio, sides = info["ratio"], (info["ours"], info["reference"])
        rows.append(
            [
                name.replace("_", " "),
                *(f"{1e3 * side['p50']:.2f} ({1e3 * side['fastest']:.2f})" for side in sides),
                f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})",
                f"{info['ratio_of_fastest']:.2f}",
            ]
        )
    times = ["ours, ms (fastest)", "reference, ms (fastest)"]
    head = ["operation", *times, "ratio, turn by turn (20 % to 80 %)", "of the fastest"]
    lines += markdown.table(head, rows)
    return "\n".join([*lines, "", "A ratio above 1 means that ours is faster.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    operations = Operations(SMALL)
    found = {}
    for name in arguments.only:
        found[name] = measure(name, getattr(operations, name)(), arguments.rounds)
        print(f"{name:18s} ratio {found[name]['ratio']['p50']:.2f}", flush=True)
    about = environment(torch.device("cpu"))
    text = as_markdown(about, arguments.rounds, found)
    print(text)
    if set(arguments.only) == set(NAMES):
        stem = f"ops_vs_reference_cpu_{about['date'][:10]}"
        (arguments.out / f"{stem}.json").write_text(json.dumps({"environment": about, "operations": found}, indent=1))
        (arguments.out / f"{stem}.md").write_text(text)


if __name__ == "__main__":
    main()
