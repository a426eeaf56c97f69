"""Evaluates frozen features and the predictor."""
