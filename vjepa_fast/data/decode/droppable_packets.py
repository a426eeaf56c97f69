"""Finds packets that no other picture refers to, from the headers of a coded stream.

Without them every other picture decodes to the same bits. What tells them apart:

* H.264: nal_ref_idc is 0 in all slices (ITU-T H.264, 7.4.1).
* HEVC: a sub-layer non-reference picture (nal_unit_type even and below 16; ITU-T H.265, table 7-1) of the highest
  temporal sub-layer that the stream has: one of a lower sub-layer may be referred to from above.
* VP9: refresh_frame_flags is 0, and the frame decoded next is a keyframe or error resilient (VP9 specification, 7.2).
  Any other frame takes motion vectors and, as a rule, probabilities from the one before it, shown or not.
"""

from __future__ import annotations

import numpy as np

from vjepa_fast.data.decode.packets import length_size, units, vp9_frames, vp9_header

_MAX_SLICE_TYPE = {"h264": 5, "hevc": 31}


class DisposableFinder:
    """Is given the packets of a stream in decoding order."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        """Args: codec: FFmpeg's name of it. extradata: of its container; says how packets are divided."""
        self._codec = codec
        self._length_size = length_size(codec, extradata)
        self._layers: list[int] = []
        """Temporal sub-layer of a packet that nothing of its own sub-layer refers to, else -1."""
        self._highest = 0
        self._resets: list[bool] = []
        """Whether a VP9 packet begins with a frame that takes nothing from the one before."""

    def add(self, data: bytes) -> None:
        layer, resets = -1, False
        if self._codec in _MAX_SLICE_TYPE:
            layer = self._layer_of_slices(data)
        elif self._codec == "vp9":
            frames = [vp9_header(frame) for frame in vp9_frames(data)]
            layer = 0 if frames and not any(frame.is_reference for frame in frames) else -1
            resets = bool(frames) and frames[0].resets
        self._layers.append(layer)
        self._resets.append(resets)

    def found(self) -> np.ndarray:
        """bool, one per packet."""
        layers = np.array(self._layers, dtype=np.int64)
        if self._codec == "vp9":
            return (layers >= 0) & np.array([*self._resets[1:], True])[: len(layers)]
        return (layers >= 0) & (layers == self._highest)

    def _layer_of_slices(self, data: bytes) -> int:
        layers = []
        for start in units(data, self._length_size):
            if self._codec == "h264":
                kind, layer = data[start] & 31, -1 if data[start] >> 5 & 3 else 0
                is_slice = 1 <= kind <= _MAX_SLICE_TYPE["h264"]
            else:
                kind, layer = data[start] >> 1 & 63, (data[start + 1] & 7) - 1
                is_slice = kind <= _MAX_SLICE_TYPE["hevc"]
                if is_slice:
                    self._highest = max(self._highest, layer)
                layer = layer if kind < 16 and kind % 2 == 0 else -1
            if is_slice:
                layers.append(layer)
        return min(layers, default=-1)
