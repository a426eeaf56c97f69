"""Speeds up the step and measures it: CUDA graphs, trials, profiles, timers."""
