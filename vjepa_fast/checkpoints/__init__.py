"""Checkpoints of every layout: writing, opening, checking, exporting."""
