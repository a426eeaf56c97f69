"""Parses what the headers of a coded packet say about its pictures.

NAL units: ITU-T H.264, 7.3.1 and H.265, 7.3.1.2; divided by lengths where the extradata is a configuration record
(ISO/IEC 14496-15), else by start codes. VP9: bitstream specification, 7.2 and, for superframes, annex B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Vp9Header(NamedTuple):
    """A frame of VP9: whether later ones may need it, whether it takes nothing from the one decoded before it but
    pictures, whether it is a keyframe, and whether it is a coded frame that is displayed."""

    is_reference: bool
    resets: bool
    is_key: bool
    is_shown: bool


class Picture(NamedTuple):
    """A packet.

    Attributes:
        is_clean: it refers to nothing, and nothing stored behind it refers to what is stored before it.
        is_single: it holds one coded picture that is displayed, no fields and no hidden pictures.
    """

    is_clean: bool
    is_single: bool


def packet_reader(codec: str, extradata: bytes | None) -> Callable[[bytes], Picture] | None:
    """What reads the packets of a stream; None for a codec that is not known here.

    Args:
        codec: FFmpeg's name.
        extradata: of the stream.
    """
    if codec in ("h264", "hevc"):
        size = length_size(codec, extradata)
        return lambda packet: (_read_h264 if codec == "h264" else _read_hevc)(packet, size)
    if codec == "vp9":
        return _read_vp9
    if codec == "mjpeg":
        return lambda packet: Picture(is_clean=True, is_single=True)
    return None


def _read_h264(packet: bytes, size: int) -> Picture:
    slices = [at for at in units(packet, size) if packet[at] & 31 in (1, 2, 5)]
    # first_mb_in_slice 0 is coded as a single 1.
    pictures = sum(packet[at + 1] >> 7 for at in slices)
    return Picture(any(packet[at] & 31 == 5 for at in slices), pictures == 1)


def _read_hevc(packet: bytes, size: int) -> Picture:
    segments = [at for at in units(packet, size) if packet[at] >> 1 & 63 < 32 and at + 2 < len(packet)]
    # 16 to 20 are BLA and IDR pictures; behind a CRA picture there can be some that refer to what is before it.
    is_clean = any(16 <= packet[at] >> 1 & 63 <= 20 for at in segments)
    return Picture(is_clean, sum(packet[at + 2] >> 7 for at in segments) == 1)


def _read_vp9(packet: bytes) -> Picture:
    frames = [vp9_header(frame) for frame in vp9_frames(packet)]
    return Picture(bool(frames) and frames[0].is_key, len(frames) == 1 and frames[0].is_shown)


def length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before a NAL unit; 0 where start codes divide them."""
    place = {"h264": 4, "hevc": 21}.get(codec, 0)
    is_record = extradata is not None and len(extradata) > place > 0 and extradata[0] == 1
    return (extradata[place] & 3) + 1 if extradata is not None and is_record else 0


def units(data: bytes, size: int) -> Iterator[int]:
    """Where the headers of the NAL units begin, each at least two bytes before the end; `size` from length_size."""
    end = len(data) - 1
    if size:
        start = size
        while start < end:
            yield start
            start += int.from_bytes(data[start - size : start], "big") + size
        return
    start = data.find(b"\0\0\1") + 3
    while 3 <= start < end:
        yield start
        start = data.find(b"\0\0\1", start) + 3


def vp9_frames(data: bytes) -> Iterator[bytes]:
    """Beginnings of the frames of a packet, which may be a superframe."""
    marker = data[-1] if data else 0
    count, size_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = len(data) - 2 - count * size_bytes
    if marker & 0xE0 != 0xC0 or index < 0 or data[index] != marker:
        yield data[:8]
        return
    start = 0
    for i in range(count):
        place = index + 1 + i * size_bytes
        size = int.from_bytes(data[place : place + size_bytes], "little")
        if size:
            yield data[start : start + min(size, 8)]
        start += size


def vp9_header(frame: bytes) -> Vp9Header:
    """Reads the uncompressed header of a frame."""
    bits = int.from_bytes(frame[:8].ljust(8, b"\0"), "big")
    place = 64

    def read(count: int) -> int:
        nonlocal place
        place -= count
        return bits >> place & (1 << count) - 1

    if read(2) != 2:
        return Vp9Header(True, False, False, False)
    profile = read(1) + 2 * read(1)
    if profile == 3:
        read(1)
    if read(1):
        # Shows an earlier frame once more.
        return Vp9Header(True, False, False, False)
    is_inter, is_shown, is_resilient = read(1), read(1), read(1)
    if not is_inter:
        return Vp9Header(True, True, True, bool(is_shown))
    is_intra_only = not is_shown and read(1)
    if not is_resilient:
        read(2)
    if is_intra_only:
        return Vp9Header(True, False, False, False)
    return Vp9Header(bool(read(8)), bool(is_resilient), False, bool(is_shown))
