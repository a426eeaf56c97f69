"""From manifests to uint8 clips: which video, which frames, decoding, batching."""
