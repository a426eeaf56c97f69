"""Keeps the module path that queued SLURM jobs were pickled with; the code is in cli/submit.py."""

from vjepa_fast.cli.submit import TrainingJob

__all__ = ["TrainingJob"]
