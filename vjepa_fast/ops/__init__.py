"""Numeric building blocks, one operation a file; importing them needs torch only."""
