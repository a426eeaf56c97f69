"""What V-JEPA learns under which settings: experiments that take minutes to hours, as scripts."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
"""Where results are kept."""
