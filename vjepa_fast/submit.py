"""The name under which a job that waits in SLURM's queue was pickled; at home in cli/submit.py."""

from vjepa_fast.cli.submit import TrainingJob

__all__ = ["TrainingJob"]
