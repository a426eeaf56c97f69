"""Decoders: each one executes the frame numbers and the crop box that vjepa_fast.data.sampling decided on."""
