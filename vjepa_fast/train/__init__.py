"""The training loop, its tasks, one training step, and how a run starts and resumes."""
