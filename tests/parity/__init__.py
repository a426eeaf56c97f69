"""Parity with the reference implementation and with Hugging Face transformers."""
