"""Using a model: features and predictions, of clips in memory (model) and of videos (videos)."""

from vjepa_fast.inference.loading import load
from vjepa_fast.inference.model import InferenceModel

__all__ = ["InferenceModel", "load"]
