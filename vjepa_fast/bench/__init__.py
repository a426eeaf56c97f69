"""Measuring whole steps and the loader, ours and the reference's; what `vjepa-fast bench` and benchmarks/ share."""
