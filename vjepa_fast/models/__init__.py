"""Encoder, predictor and the two together, with the parameter names of the reference."""
