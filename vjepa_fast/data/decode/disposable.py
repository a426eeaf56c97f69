"""Packets that no other picture needs, read from the headers of a coded stream.

Without them every other picture decodes to the same bits. What tells them apart:

* H.264: nal_ref_idc is 0 in all slices (ITU-T H.264, 7.4.1).
* HEVC: a sub-layer non-reference picture (nal_unit_type even and below 16; ITU-T H.265, table 7-1) of the highest
  temporal sub-layer that the stream has: one of a lower sub-layer may be referred to from above.
* VP9: refresh_frame_flags is 0, and the frame decoded next is a keyframe or error resilient (VP9 specification, 7.2).
  Any other frame takes motion vectors and, as a rule, probabilities from the one before it, shown or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_MAX_SLICE_TYPE = {"h264": 5, "hevc": 31}


class DisposableFinder:
    """Is given the packets of a stream in decoding order."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        """Args: codec: FFmpeg's name of it. extradata: of its container; says how packets are divided."""
        self._codec = codec
        self._length_size = _length_size(codec, extradata or b"")
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
            frames = [_vp9_header(frame) for frame in _vp9_frames(data)]
            layer = 0 if frames and not any(is_reference for is_reference, _ in frames) else -1
            resets = bool(frames) and frames[0][1]
        self._layers.append(layer)
        self._resets.append(resets)

    def found(self) -> np.ndarray:
        """bool, one per packet."""
        layers = np.array(self._layers, dtype=np.int64)
        if self._codec == "vp9":
            return (layers >= 0) & np.array([*self._resets[1:], True])[:len(layers)]
        return (layers >= 0) & (layers == self._highest)

    def _layer_of_slices(self, data: bytes) -> int:
        layers = []
        for start in self._units(data):
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

    def _units(self, data: bytes) -> Iterator[int]:
        """Where the headers of the NAL units begin."""
        end = len(data) - 1
        if self._length_size:
            start = self._length_size
            while start < end:
                yield start
                start += int.from_bytes(data[start - self._length_size:start], "big") + self._length_size
            return
        start = data.find(b"\0\0\1") + 3
        while 3 <= start < end:
            yield start
            start = data.find(b"\0\0\1", start) + 3


def _length_size(codec: str, extradata: bytes) -> int:
    """Bytes of the length before a NAL unit; 0 where start codes divide them."""
    place = {"h264": 4, "hevc": 21}.get(codec, 0)
    return (extradata[place] & 3) + 1 if len(extradata) > place and extradata[0] == 1 and place else 0


def _vp9_frames(data: bytes) -> Iterator[bytes]:
    """Beginnings of the frames of a packet, which may be a superframe (VP9 specification, annex B)."""
    marker = data[-1] if data else 0
    count, size_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = len(data) - 2 - count * size_bytes
    if marker & 0xE0 != 0xC0 or index < 0 or data[index] != marker:
        yield data[:8]
        return
    start = 0
    for i in range(count):
        place = index + 1 + i * size_bytes
        size = int.from_bytes(data[place:place + size_bytes], "little")
        if size:
            yield data[start:start + min(size, 8)]
        start += size


def _vp9_header(frame: bytes) -> tuple[bool, bool]:
    """Whether later frames may need it, and whether it takes nothing from the frame before it but pictures."""
    bits = int.from_bytes(frame[:8].ljust(8, b"\0"), "big")
    place = 64

    def read(count: int) -> int:
        nonlocal place
        place -= count
        return bits >> place & (1 << count) - 1

    if read(2) != 2:
        return True, False
    profile = read(1) + 2 * read(1)
    if profile == 3:
        read(1)
    is_existing = read(1)
    if is_existing:
        return True, False
    is_inter, is_shown, is_resilient = read(1), read(1), read(1)
    is_intra_only = is_inter and not is_shown and read(1)
    if not is_resilient:
        read(2)
    if not is_inter or is_intra_only:
        return True, not is_inter
    return bool(read(8)), bool(is_resilient)
