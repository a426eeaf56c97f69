"""The two halves of a decoding back end.

A request (vjepa_fast.data.decode.request) goes through four calls:

    prepare   in the decoding process: one request -> whatever the back end needs of it. A clip that cannot be had is a
              DecodeError here, and another video takes its place. prepare_together does it for clips of one video.
    collate   in the decoding process: the prepared clips of a batch -> few large tensors, which cross by shared memory
    start     in the training process, ahead of the step: begins what is left to do, and returns at once on a GPU
    wait      in the training process, when the step wants the batch: uint8 [B, T, H, W, 3], ordered on its stream
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vjepa_fast.data.decode.jpeg import decode_jpeg_clips
from vjepa_fast.data.decode.pyav import decode_clips
from vjepa_fast.data.decode.request import ClipRequest, JpegSource


class Preparer(Protocol):
    """The half that runs in the decoding processes. It can be pickled, and never touches a GPU."""

    def prepare(self, request: ClipRequest) -> Any:
        """Raises DecodeError where the clip cannot be had."""
        ...

    def prepare_together(self, requests: Sequence[ClipRequest]) -> list[Any]:
        """What `prepare` gives for each of some clips of one video; DecodeError where one of them cannot be had.

        Frames are shared among clips that have the same object as source.
        """
        ...

    def collate(self, prepared: list[Any]) -> Any:
        """At least one clip, all of one number of frames."""
        ...


@dataclass(frozen=True)
class Finished:
    """Clips of one frames-per-clip group.

    Attributes:
        clips: uint8 [B, T, H, W, 3], contiguous, on the device; its use is ordered on the stream that was current.
        failed: (position in the batch, reason) of clips that could not be decoded after all; their pixels mean nothing.
    """

    clips: Tensor
    failed: list[tuple[int, str]]


class Finisher(Protocol):
    """The half that runs in the training process."""

    num_ahead: int
    """Batches that may be started and not yet waited for."""

    def start(self, collated: Any) -> Any:
        """Begins the work. May be called while another thread is in `wait`."""
        ...

    def wait(self, started: Any) -> Finished:
        """Called once for everything that was started and is not given up."""
        ...

    def close(self) -> None:
        """Gives back what was allocated; `start` may be called again."""
        ...


class HostPreparer:
    """Decodes on the CPU, in the decoding process: a clip is uint8 [T, H, W, 3]."""

    def prepare(self, request: ClipRequest) -> Tensor:
        return self.prepare_together([request])[0]

    def prepare_together(self, requests: Sequence[ClipRequest]) -> list[Tensor]:
        is_jpeg = isinstance(requests[0].source, JpegSource)
        return decode_jpeg_clips(requests) if is_jpeg else decode_clips(requests)

    def collate(self, prepared: list[Tensor]) -> Tensor:
        return torch.stack(prepared)


class HostFinisher:
    """Copies decoded clips to the device: on a GPU from pinned memory, on a stream of its own."""

    def __init__(self, device: torch.device, pin: bool, num_ahead: int) -> None:
        self.num_ahead = num_ahead
        self._device = device
        self._pin = pin
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, collated: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._stream is None:
            return collated.to(self._device), None
        with torch.cuda.stream(self._stream):
            clips = (collated.pin_memory() if self._pin else collated).to(self._device, non_blocking=True)
            return clips, self._stream.record_event()

    def wait(self, started: tuple[Tensor, torch.cuda.Event | None]) -> Finished:
        clips, event = started
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            # The memory belongs to the copying stream and must not go back to it while a step still reads it.
            clips.record_stream(stream)
        return Finished(clips, [])

    def close(self) -> None:
        pass
