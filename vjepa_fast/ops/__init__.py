"""Numeric building blocks, one operation a file; importing them starts no device and compiles nothing."""
