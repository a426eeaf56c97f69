"""Cuts the part of a video that a clip needs into a small file of its own, without decoding.

DALI's decoder has no random access: it decodes what it is given from the first picture on. A slice begins at the
keyframe before the first wanted frame, ends at the last wanted one, and leaves out the pictures that nothing wanted
refers to (vjepa_fast.data.decode.droppable_packets). The wanted frames come out of it as out of the whole file, to the
bit.

The container is Matroska whatever the source was, with new timestamps: pictures are numbered without a gap, which is
how DALI counts them, and variable frame rate, edit lists and coarse time bases are gone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from vjepa_fast.data.decode.index import DecodeError, VideoIndex, open_video, reading
from vjepa_fast.data.decode.packets import Picture, packet_reader

_MS_PER_FRAME = 40


class Unsliceable(Exception):
    """A sound video that cannot be cut or is not wanted; the message names it: `H.264 with open groups of pictures`."""


Refusal = Callable[[str, str, int, int], "str | None"]
"""(codec, pix_fmt, width, height) -> what such a video is called if slices of it are of no use, else None."""


@dataclass(frozen=True)
class Slice:
    """A part of a video.

    Attributes:
        data: a Matroska file.
        frames: int64 [U] ascending: which of its frames are wanted, counted in presentation order.
        places: int64 [T]: frame t of the clip is frames[places[t]].
        single: every packet holds exactly one displayed picture.
    """

    data: bytes
    frames: np.ndarray
    places: np.ndarray
    single: bool


def cut(path: str, index: VideoIndex, frame_numbers: np.ndarray, refuse: Refusal) -> Slice:
    """Cuts out what is needed for some frames.

    Args:
        path: of the video.
        index: from vjepa_fast.data.decode.index.load_index.
        frame_numbers: int64 [T], each in [0, index.num_frames), any order, repeats allowed.
        refuse: asked before anything is read.

    Raises:
        DecodeError: the file is gone or damaged.
        Unsliceable: refused, or it has to be decoded by other means.
    """
    wanted, places = np.unique(np.asarray(frame_numbers, dtype=np.int64), return_inverse=True)
    assert len(wanted) and wanted[0] >= 0 and wanted[-1] < index.num_frames
    if not index.seekable:
        raise Unsliceable("video without usable timestamps")
    gop = int(np.searchsorted(index.keyframes, wanted[0], side="right")) - 1
    if gop < 0:
        raise Unsliceable("video that begins between two keyframes")
    with reading(path), open_video(path) as (container, stream):
        codec = stream.codec_context
        name = codec.codec.canonical_name
        reader = packet_reader(name, codec.extradata)
        refused = refuse(name, codec.pix_fmt or "", codec.width, codec.height)
        if reader is None or refused:
            raise Unsliceable(refused or f"{name} video")
        if gop:
            container.seek(int(index.keyframe_dts[gop]), stream=stream, backward=True)
        packets = _read(container.demux(stream), int(index.pts[index.keyframes[gop]]), index.pts[wanted])
        pictures = [reader(bytes(packet)) for packet in packets]
        if name == "h264" and not pictures[0].is_clean:
            raise Unsliceable("H.264 with open groups of pictures")
        numbers = np.searchsorted(index.pts, [packet.pts for packet in packets])
        needed = _needed(pictures, index.disposable[numbers].tolist(), np.isin(numbers, wanted).tolist())
        kept = [packet for packet, keep in zip(packets, needed, strict=True) if keep]
        order = np.sort(np.array([packet.pts for packet in kept], dtype=np.int64))
        data = _write(kept, order, stream)
        single = all(picture.is_single for picture, keep in zip(pictures, needed, strict=True) if keep)
        return Slice(data, np.searchsorted(order, index.pts[wanted]), places, single)


def _read(demuxed: Any, start_pts: int, wanted_pts: np.ndarray) -> list[Any]:
    """The packets in the order of storage, from the keyframe to the last wanted one."""
    due = set(wanted_pts.tolist())
    packets: list[Any] = []
    for packet in demuxed:
        if not packet.size or not packets and packet.pts != start_pts:
            continue
        if packet.is_corrupt:
            raise DecodeError("a part of it is damaged")
        if packet.is_discard or packet.pts is None:
            raise Unsliceable("video with pictures that are not displayed")
        # Displayed before the keyframe but stored behind it: it refers to pictures that are not in the slice.
        if packet.pts >= start_pts:
            packets.append(packet)
        due.discard(packet.pts)
        if not due:
            return packets
    raise Unsliceable("video in which a keyframe is not found by its time")


def _needed(pictures: Sequence[Picture], is_disposable: Sequence[bool], is_wanted: Sequence[bool]) -> list[bool]:
    """Which pictures have to be decoded: from the last one back, those that a needed one can refer to."""
    needed = [False] * len(pictures)
    is_referred_to = False
    for number in range(len(pictures) - 1, -1, -1):
        if is_wanted[number] or (is_referred_to and not is_disposable[number]):
            needed[number] = is_referred_to = True
        if pictures[number].is_clean:
            is_referred_to = False
    return needed


def _write(packets: Sequence[Any], order: np.ndarray, stream: Any) -> bytes:
    ranks = np.searchsorted(order, [packet.pts for packet in packets])
    # A picture is decoded no later than it is displayed.
    delay = int(np.max(np.arange(len(ranks)) - ranks))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        out = container.add_stream_from_template(stream)
        out.time_base = Fraction(1, 1000)
        for number, (packet, rank) in enumerate(zip(packets, ranks.tolist(), strict=True)):
            packet.stream = out
            packet.time_base = out.time_base
            packet.pts = (rank + delay) * _MS_PER_FRAME
            packet.dts = number * _MS_PER_FRAME
            packet.duration = _MS_PER_FRAME
            container.mux_one(packet)
    return file.getvalue()
