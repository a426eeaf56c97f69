"""`vjepa-fast ARGV` for torchrun; the second process kills itself at step KILL_AT of its first start."""

from __future__ import annotations

import os
import signal

from tests.e2e.harness import signal_in_step
from vjepa_fast.cli.main import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "KILL_AT" in os.environ:
    signal_in_step(int(os.environ["KILL_AT"]), signal.SIGKILL)
main()
