"""Measuring: every operation, the whole step and the loader, as times and as shares of what the machine can do."""
