"""Fixtures: videos, and the trainer of a tiny run."""

from tests.helpers.trainer_fixtures import make, video_csv

__all__ = ["make", "video_csv"]
