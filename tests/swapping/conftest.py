"""Fixtures: videos, the trainer of a tiny run, and what tests of swapping count."""

from tests.helpers.trainer_fixtures import make, video_csv
from tests.swapping.cases import calls, same_start

__all__ = ["calls", "make", "same_start", "video_csv"]
