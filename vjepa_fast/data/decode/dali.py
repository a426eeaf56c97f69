"""Prepares encoded clips for DALI; vjepa_fast.data.decode.dali_pipelines decodes them.

DALI decides nothing. It gets a slice of the video (vjepa_fast.data.decode.remux) or the JPEG files of its frames,
which frames are wanted, and the crop box. Colours follow DALI: BT.601 whatever the stream says, chroma interpolated.

What DALI cannot decode, or would count wrongly (its GPU decoder takes every picture that a packet holds for a frame,
also hidden ones and single fields), is decoded by PyAV in the decoding process and comes along as pixels. Repeated
frames are decoded once: DALI would begin the slice again for each.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vjepa_fast.data.decode.index import DecodeError, reading
from vjepa_fast.data.decode.pyav import decode_clip
from vjepa_fast.data.decode.remux import Unsliceable, cut
from vjepa_fast.data.decode.request import ClipRequest, ImageSource, JpegSource, VideoSource
from vjepa_fast.data.sampling import Box

INSTALL = "pip install 'vjepa-fast[dali]'"
_SMALLEST_ON_GPU = {"h264": 48, "hevc": 144, "vp9": 128}
"""Shortest side that NVDEC takes (NVDEC Application Note, table of capabilities)."""


def missing(device: torch.device) -> str | None:
    """Why DALI cannot be used for a device; None if it can."""
    if sys.platform != "linux":
        return "DALI exists for Linux only"
    try:
        import nvidia.dali
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            return f"DALI lacks a package ({error}); {INSTALL}"
        return f"DALI is not installed; {INSTALL}"
    except (ImportError, OSError) as error:
        return f"DALI does not import ({error}); {INSTALL}"
    if not hasattr(nvidia.dali.fn.decoders, "video"):
        return f"DALI {nvidia.dali.__version__} is too old, it has no decoders.video; {INSTALL}"
    if device.type == "cuda":
        try:
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError:
            return (
                "the driver's video library libnvcuvid.so.1 is not there; in a container start it with "
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
            )
    return None


class EncodedClip(NamedTuple):
    """A clip for DALI.

    Attributes:
        files: one slice, or one JPEG for each decoded frame.
        frames: int32 [U] which frames of the slice; None for JPEGs.
        places: int64 [T] into the decoded frames.
        box: part of the frames to keep.
        flip: mirror left to right.
    """

    files: list[bytes]
    frames: np.ndarray | None
    places: np.ndarray
    box: Box
    flip: bool


class DecodedClip(NamedTuple):
    """A clip that PyAV has decoded: uint8 [T, H, W, 3], and what kind of video that is if DALI ought to have."""

    pixels: Tensor
    what: str | None


class DaliBatch(NamedTuple):
    """Clips of one number of frames, as they cross to the training process.

    Attributes:
        blob: uint8, all encoded bytes.
        encoded: (position in the batch, clip whose files are empty, sizes of the files in `blob`).
        pixels: uint8 [D, T, H, W, 3] decoded clips, or None.
        decoded: their positions.
        refused: kinds of video that PyAV decoded.
        num_frames: T.
    """

    blob: Tensor
    encoded: list[tuple[int, EncodedClip, list[int]]]
    pixels: Tensor | None
    decoded: list[int]
    refused: list[str]
    num_frames: int


class DaliPreparer:
    """Cuts slices and checks them. `on_gpu`: what will decode them."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu

    def prepare(self, request: ClipRequest) -> EncodedClip | DecodedClip:
        source = request.source
        files: list[bytes]
        frames: np.ndarray | None = None
        if isinstance(source, VideoSource):
            try:
                part = cut(source.path, source.index, request.frame_numbers, self._refuse)
                if self._on_gpu and not part.single:
                    raise Unsliceable("video with hidden or interlaced pictures")
            except Unsliceable as why:
                return DecodedClip(decode_clip(request), str(why))
            files, frames, places = [part.data], part.frames.astype(np.int32), part.places
        elif isinstance(source, ImageSource):
            file = _read_jpeg(source.path)
            if file is None:
                return DecodedClip(decode_clip(request), None)
            files, places = [file], np.zeros(len(request.frame_numbers), dtype=np.int64)
        else:
            assert isinstance(source, JpegSource)
            wanted, places = np.unique(request.frame_numbers, return_inverse=True)
            files = list(source.read_jpegs(wanted))
            if not all(file[:2] == b"\xff\xd8" and file[-2:] == b"\xff\xd9" for file in files):
                raise DecodeError("one of its frames is no whole JPEG file")
        return EncodedClip(files, frames, places, request.box, request.flip)

    def prepare_together(self, requests: Sequence[ClipRequest]) -> list[EncodedClip | DecodedClip]:
        # A slice each: to share one, its pictures would have to be kept whole on the device until all are cropped.
        return [self.prepare(request) for request in requests]

    def _refuse(self, codec: str, pix_fmt: str, width: int, height: int) -> str | None:
        if codec not in (("h264", "hevc", "vp9") if self._on_gpu else ("vp9", "mjpeg")):
            return f"{codec} video"
        if pix_fmt not in ("yuv420p", "yuvj420p"):
            return f"{codec} video in {pix_fmt}"
        if self._on_gpu and min(width, height) < _SMALLEST_ON_GPU[codec]:
            return f"{codec} video of less than {_SMALLEST_ON_GPU[codec]} pixels"
        return None

    def collate(self, prepared: list[EncodedClip | DecodedClip]) -> DaliBatch:
        encoded, decoded, pieces, pixels, refused = [], [], [], [], set()
        for position, clip in enumerate(prepared):
            if isinstance(clip, DecodedClip):
                decoded.append(position)
                pixels.append(clip.pixels)
                refused |= {clip.what} if clip.what else set()
                num_frames = len(clip.pixels)
            else:
                encoded.append((position, clip._replace(files=[]), [len(file) for file in clip.files]))
                pieces += clip.files
                num_frames = len(clip.places)
        blob = torch.frombuffer(bytearray(b"".join(pieces) or b"\0"), dtype=torch.uint8)
        return DaliBatch(blob, encoded, torch.stack(pixels) if pixels else None, decoded, sorted(refused), num_frames)


def _read_jpeg(path: str) -> bytes | None:
    """A grey or RGB JPEG file; None for any other image."""
    with reading(path):
        with Image.open(path) as image:
            if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return None
        with open(path, "rb") as file:
            content = file.read()
    return content if content.endswith(b"\xff\xd9") else None
