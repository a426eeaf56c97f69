"""Monitors a run: metrics, health, progress, warnings, recovery."""
