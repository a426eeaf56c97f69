"""A profile of a few steps, for `--profile`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vjepa_fast.train.files import disk_errors

NUM_STEPS = 3


class StepProfiler:
    """Records NUM_STEPS steps and writes profile/trace.json and profile/operators.txt.

    Args:
        folder: run folder.
        first: number of finished steps at which recording begins.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder = folder / "profile"
        self.first = first
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities, record_shapes=True)
        self.recording = False

    def after_step(self, done: int) -> None:
        """Call after each step with the number of finished steps."""
        if done == self.first:
            self.profile.start()
            self.recording = True
        elif done == self.first + NUM_STEPS:
            self.close()

    def close(self) -> None:
        """End the recording, also before its time, and write what there is."""
        if not self.recording:
            return
        self.recording = False
        self.profile.stop()
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.profile.export_chrome_trace(str(self.folder / "trace.json"))
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            (self.folder / "operators.txt").write_text(self.profile.key_averages().table(sort_by=order, row_limit=40))
