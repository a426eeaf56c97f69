"""Attention over packed sequences by the fastest back end that is there (op), chosen by measurement (choice)."""

from vjepa_fast.ops.attention.op import attention, select_backend

__all__ = ["attention", "select_backend"]
