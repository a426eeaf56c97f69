"""Configs of Meta's three releases, by their keys: V-JEPA 1 (v1), 2 (v2) and 2.1 (v21)."""
