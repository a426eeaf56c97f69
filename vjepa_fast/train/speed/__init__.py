"""What makes the step faster, and how it is measured: CUDA graphs, trials, profiles, timers."""
