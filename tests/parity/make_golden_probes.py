"""Write golden/probe_*.json from runs of the reference's attentive probes.

VJEPA1_REFERENCE=<checkout> VJEPA2_REFERENCE=<checkout> python -m tests.parity.make_golden_probes
"""

from __future__ import annotations

import hashlib
import os
import warnings

import torch

from . import golden_format, probe_ours, probe_reference
from .probe_cases import PROBE_CASES, known


def main() -> None:
    if not all(os.environ.get(name) for name in probe_reference.VARIABLES.values()):
        raise SystemExit(f"set {' and '.join(probe_reference.VARIABLES.values())} to checkouts")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*sdp_kernel", FutureWarning)
    for case in PROBE_CASES.values():
        run = probe_reference.run(case, probe_ours.weights(case), torch.float64)
        folder = probe_reference.root(case.version)
        print(
            golden_format.write(
                case.name,
                {
                    "provenance": {
                        "reference": {1: "facebookresearch/jepa", 2: "facebookresearch/vjepa2"}[case.version],
                        "sha256": {
                            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                            for name in probe_reference.SOURCES
                        },
                        "torch": torch.__version__,
                    },
                    "steps": [
                        {
                            "loss": loss,
                            "lr": lr,
                            "weight_decay": decay,
                            "outputs": golden_format.summary("outputs", outputs),
                            "gradients": {
                                name: golden_format.summary(name, known(name, value))
                                for name, value in gradients.items()
                            },
                        }
                        for loss, outputs, gradients, lr, decay in run.steps
                    ],
                    "weights": {
                        name: golden_format.summary(name, known(name, value)) for name, value in run.weights.items()
                    },
                },
            )
        )


if __name__ == "__main__":
    main()
