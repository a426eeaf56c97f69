"""Using a model: features and predictions, of clips in memory (model) and of videos (videos)."""

from vjepa_fast.inference.model import InferenceModel, load

__all__ = ["InferenceModel", "load"]
