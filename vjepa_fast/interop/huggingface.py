"""Weights to and from Hugging Face's layout; documented here, at home in checkpoints/huggingface/."""

from vjepa_fast.checkpoints.huggingface.weights import encoder_to_hf, from_hf, to_hf

__all__ = ["encoder_to_hf", "from_hf", "to_hf"]
