"""What a training step costs before it runs: arithmetic, bytes, launches, memory and time on a named GPU."""
