"""Masks: rules, samplers, loss weights, and the packed batch of masks."""
