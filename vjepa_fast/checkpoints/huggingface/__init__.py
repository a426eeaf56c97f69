"""Hugging Face's VJEPA2Model: weights, config and the classifier's probe."""
