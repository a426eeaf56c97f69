"""Predicts the cost of a training step: arithmetic, bytes, launches, memory and time on a named GPU."""
