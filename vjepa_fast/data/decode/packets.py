"""What a compressed picture says of itself in its first bytes: whether others refer to it, whether it refers to others.

H.264 (ITU-T H.264, 7.3.1): nal_ref_idc 0 marks a picture that no other refers to, nal_unit_type 5 one behind which
nothing refers to what came before (IDR).
HEVC (ITU-T H.265, 7.4.2.2): the even types below 16 are not referred to within their temporal sub-layer, so such a
picture is disposable when no higher sub-layer is there; 16 to 20 are IDR and BLA pictures.
VP9 (bitstream specification 0.6, 6.2): refresh_frame_flags 0 leaves the reference slots as they are. The probabilities
and motion vectors of the last picture also carry over, unless the next one has error_resilient_mode; without that a
picture is not disposable. A packet can hold hidden pictures in front of the displayed one (annex B).
MJPEG: every picture stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Picture(NamedTuple):
    """One packet.

    Attributes:
        disposable: no other picture is decoded differently without it (VP9: if the next one is independent).
        clean: it refers to nothing, and nothing stored behind it refers to what is stored before it.
        independent: its decoding takes no state from the picture stored before it, apart from references.
        sublayer: HEVC's temporal sub-layer; a disposable picture is needed by higher ones.
        single: the packet holds one displayed picture, neither fields nor hidden pictures.
    """

    disposable: bool
    clean: bool
    independent: bool = True
    sublayer: int = 0
    single: bool = True


def packet_reader(codec: str, extradata: bytes | None) -> Callable[[bytes], Picture] | None:
    """What reads the packets of a stream; None for a codec that is not known here.

    Args:
        codec: FFmpeg's name.
        extradata: of the stream; says how H.264 and HEVC packets are split into units.
    """
    extradata = extradata or b""
    if codec == "h264":
        # avcC (ISO/IEC 14496-15, 5.3.3) begins with version 1; anything else is start codes.
        size = (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else 0
        return lambda packet: _read_h264(packet, size)
    if codec == "hevc":
        size = (extradata[21] & 3) + 1 if len(extradata) > 22 and extradata[0] == 1 else 0
        return lambda packet: _read_hevc(packet, size)
    if codec == "vp9":
        return _read_vp9
    if codec == "mjpeg":
        return lambda packet: Picture(disposable=True, clean=True)
    return None


def _units(packet: bytes, length_size: int) -> Iterator[int]:
    """Offsets of the units' headers, at least three bytes before the end."""
    if length_size:
        at = 0
        while at + length_size + 3 <= len(packet):
            yield at + length_size
            at += length_size + int.from_bytes(packet[at:at + length_size], "big")
        return
    at = packet.find(b"\0\0\1")
    while at >= 0 and at + 6 <= len(packet):
        yield at + 3
        at = packet.find(b"\0\0\1", at + 3)


def _read_h264(packet: bytes, length_size: int) -> Picture:
    disposable, idr, first_slices = True, False, 0
    for at in _units(packet, length_size):
        kind = packet[at] & 31
        if kind in (1, 2, 5):
            disposable &= packet[at] >> 5 & 3 == 0
            idr |= kind == 5
            # first_mb_in_slice 0 is coded as a single 1.
            first_slices += packet[at + 1] >> 7
    return Picture(disposable and first_slices > 0, idr, single=first_slices == 1)


def _read_hevc(packet: bytes, length_size: int) -> Picture:
    disposable, clean, sublayer, first_slices = True, False, 0, 0
    for at in _units(packet, length_size):
        kind = packet[at] >> 1 & 63
        if kind < 32:
            disposable &= kind < 16 and kind % 2 == 0
            clean |= 16 <= kind <= 20
            sublayer = (packet[at + 1] & 7) - 1
            first_slices += packet[at + 2] >> 7
    return Picture(disposable and first_slices > 0, clean, sublayer=sublayer, single=first_slices == 1)


def _read_vp9(packet: bytes) -> Picture:
    last = packet[-1]
    index_size = 2 + ((last >> 3 & 3) + 1) * ((last & 7) + 1)
    if last >> 5 == 0b110 and index_size <= len(packet) and packet[-index_size] == last:
        key = _Bits(packet).vp9_is_key()
        return Picture(disposable=False, clean=key, independent=key, single=False)
    bits = _Bits(packet)
    profile = bits.vp9_profile()
    if bits.take(1):
        # Shows an earlier picture once more.
        return Picture(disposable=False, clean=False, independent=False, single=False)
    inter, shown, resilient = bits.take(1), bits.take(1), bits.take(1)
    if not inter:
        return Picture(disposable=False, clean=True, single=bool(shown))
    intra_only = 0 if shown else bits.take(1)
    if not resilient:
        bits.take(2)
    if intra_only:
        bits.take(24)
        if profile:
            return Picture(disposable=False, clean=False, independent=bool(resilient), single=False)
    refreshed = bits.take(8)
    return Picture(refreshed == 0, clean=False, independent=bool(resilient), single=bool(shown))


class _Bits:
    """The first 16 bytes of a packet, from the most significant bit on; zeros behind its end."""

    def __init__(self, packet: bytes) -> None:
        self._value = int.from_bytes(packet[:16].ljust(16, b"\0"), "big")
        self._left = 128

    def take(self, count: int) -> int:
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def vp9_profile(self) -> int:
        """Reads frame_marker and the profile."""
        self.take(2)
        profile = self.take(1) + 2 * self.take(1)
        if profile == 3:
            self.take(1)
        return profile

    def vp9_is_key(self) -> bool:
        self.vp9_profile()
        return not self.take(1) and not self.take(1)
