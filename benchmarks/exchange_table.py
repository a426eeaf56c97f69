"""The table of docs/clusters.md: what many GPUs exchange, and what is left of their speed, by the cost model.

python -m benchmarks.exchange_table [--gpu h100]
"""

from __future__ import annotations

import argparse

from vjepa_fast.common import markdown
from vjepa_fast.config import load_recipe
from vjepa_fast.cost.communication import NAMES, WAYS, Cluster, exchange
from vjepa_fast.cost.gpus import gpu_named
from vjepa_fast.cost.plan import draw_masks
from vjepa_fast.cost.prediction import predict

RECIPES = {"ViT-L": "vitl16-256", "ViT-g": "vitg16-256"}
CLUSTERS = [
    (1, "nvlink"),
    (8, "nvlink"),
    (8, "ib400"),
    (8, "eth100"),
    (8, "eth25"),
    (64, "ib400"),
    (64, "eth100"),
    (64, "eth25"),
]
"""Machines of eight GPUs, and what is between them. No NVLink domain has 512 GPUs."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", default="h100")
    gpu = gpu_named(parser.parse_args().gpu)
    rows, alone = [], []
    for name, recipe in RECIPES.items():
        cfg = load_recipe(recipe)
        prediction = predict(cfg, gpu, draw_masks(cfg, cfg.data.per_process(1)))
        alone.append(f"{name}: {1e3 * prediction.busy:.0f} ms a step of {prediction.clips:g} clips on one {gpu.name}")
        for nodes, link in CLUSTERS:
            cells = [name, str(8 * nodes), link]
            for way in WAYS:
                x = exchange(way, cfg, prediction, Cluster.of(gpu.name, nodes, 8, link))
                cells += [
                    f"{x.sent / 1e9:.1f}",
                    f"{1e3 * (x.exposed_backward + x.exposed_forward):.1f}",
                    f"{100 * x.efficiency:.0f} %",
                ]
            rows.append(cells)
    print("; ".join(alone) + ".\n")
    head = ["model", "GPUs", "link"]
    for way in WAYS:
        head += [f"{NAMES[way]}: GB sent", "exposed, ms", "efficiency"]
    print("\n".join(markdown.table(head, rows)))


if __name__ == "__main__":
    main()
