"""DALI pipelines: encoded clips (vjepa_fast.data.decode.dali) -> uint8 [B, T, H, W, 3] on the device.

A pipeline decodes, crops, then resizes and flips in one operator; its output becomes a torch tensor without a copy.
JPEG files on the CPU end with the crop, of which DALI decodes little more than it shows: PyTorch's resize takes a sixth
of DALI's time there, and the clips are then those of Pillow (vjepa_fast.data.decode.jpeg) to the bit.

On a GPU the tensor belongs to torch's current stream: that stream waits for DALI, and DALI takes the memory back behind
what torch has queued on it by then. Every batch in work has a pipeline of its own, so that several of a GPU's decoders
are busy.

A clip that makes DALI give up takes the whole batch with it: its clips are then decoded one by one, and those that fail
are reported.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.backend import Finished, HostFinisher
from vjepa_fast.data.decode.dali import DaliBatch, EncodedClip
from vjepa_fast.data.decode.pyav import resize_clip

_DEVICE_TROUBLE = (
    "out of memory",
    "cuda allocation failed",
    "can't allocate",
    "could not allocate physical",
    "bad_alloc",
    "nvml",
    "nvcuvid",
    "libcuda",
    "cuinit",
    "no cuda-capable device",
    "initialization error",
    "failed to load cuda driver",
    "failed to initialize driver",
    "driver is not installed",
    "driver version is insufficient",
)
"""Parts of messages that are no file's fault. The names of CUDA and NVDEC functions are not among them: damaged streams
fail in these too, as "CUDA driver API error CUDA_ERROR_INVALID_VALUE (1): invalid argument"."""
_LAST_LINE = "Current pipeline object is no longer valid."


class _Sample(NamedTuple):
    """A clip with its bytes, uint8 [N] each."""

    position: int
    clip: EncodedClip
    files: list[np.ndarray]


@dataclass
class _Run:
    """Clips that a pipeline is decoding."""

    key: tuple[str, int]
    samples: list[_Sample]
    pipeline: Any


class _Started(NamedTuple):
    size: int
    num_frames: int
    runs: list[_Run]
    decoded: list[int]
    copied: Any


class DaliFinisher:
    """Runs the pipelines. `start` may be called by another thread than `wait`.

    Args:
        device: where the clips go; a GPU with its index, because threads differ in their current device.
        size: height and width of a clip.
        batch_size: most clips in a batch.
        num_ahead: batches in work at a time, each by its own pipeline.
        num_threads: of each pipeline; on a GPU each keeps one decoder session busy.
        pin: pin what PyAV has decoded before it is copied.
    """

    def __init__(
        self, device: torch.device, size: tuple[int, int], batch_size: int, num_ahead: int, num_threads: int, pin: bool
    ) -> None:
        self.num_ahead = num_ahead
        self._device = device
        self._size = size
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._host = HostFinisher(device, pin, num_ahead)
        # A pipeline for every kind of source and number of frames keeps the sizes of its buffers.
        self._idle: dict[tuple[str, int], list[Any]] = {}
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def start(self, collated: DaliBatch) -> _Started:
        for what in collated.refused:
            if what not in self._warned:
                self._warned.add(what)
                where = "with this GPU" if self._device.type == "cuda" else "on the CPU"
                warnings.warn(
                    f"DALI does not decode {what} {where}: PyAV decodes such clips in the decoding processes",
                    RuntimeWarning,
                    stacklevel=2,
                )
        samples: dict[str, list[_Sample]] = {}
        blob, at = collated.blob.numpy(), 0
        for position, clip, sizes in collated.encoded:
            ends = at + np.cumsum(sizes)
            files = [blob[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]
            at = int(ends[-1])
            samples.setdefault("jpeg" if clip.frames is None else "video", []).append(_Sample(position, clip, files))
        runs = [self._launch((kind, collated.num_frames), clips) for kind, clips in samples.items()]
        copied = None if collated.pixels is None else self._host.start(collated.pixels)
        return _Started(
            len(collated.encoded) + len(collated.decoded), collated.num_frames, runs, collated.decoded, copied
        )

    def wait(self, started: _Started) -> Finished:
        shape = started.size, started.num_frames, *self._size, 3
        failed: list[tuple[int, str]] = []
        parts: list[tuple[list[_Sample], list[Tensor]]] = []
        for run in started.runs:
            for samples, output in self._collect(run, failed):
                whole = None if self._resizes_later(run.key[0]) else _as_whole(samples, output)
                if whole is not None and len(samples) == started.size:
                    return Finished(whole.view(shape), failed)
                parts.append((samples, self._one_by_one(run.key[0], samples, output)))
        clips = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for samples, tensors in parts:
            for sample, frames in zip(samples, tensors, strict=True):
                for place, frame in zip(sample.clip.places.tolist(), clips[sample.position], strict=True):
                    frame.copy_(frames[place])
        if started.copied is not None:
            for position, pixels in zip(started.decoded, self._host.wait(started.copied).clips, strict=True):
                clips[position].copy_(pixels)
        return Finished(clips, failed)

    def close(self) -> None:
        with self._lock:
            self._idle.clear()

    def _launch(self, key: tuple[str, int], samples: list[_Sample]) -> _Run:
        with self._lock:
            idle = self._idle.setdefault(key, [])
            pipeline = idle.pop() if idle else None
        if pipeline is None:
            pipeline = self._build(key)
        inputs: dict[str, list[np.ndarray]] = {"files": []}
        if key[0] == "video":
            inputs["frames"] = [sample.clip.frames for sample in samples if sample.clip.frames is not None]
        for sample in samples:
            inputs["files"] += sample.files
            (top, left, height, width), flip = sample.clip.box, sample.clip.flip
            pairs = {"corner": (top, left), "shape": (height, width)}
            if not self._resizes_later(key[0]):
                # Swapped ends of the second axis mirror it.
                pairs |= {"start": (0, width * flip), "end": (height, width * (not flip))}
            for name, pair in pairs.items():
                inputs.setdefault(name, []).extend([np.array(pair, dtype=np.float32)] * len(sample.files))
        for name, values in inputs.items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()
        return _Run(key, samples, pipeline)

    def _collect(self, run: _Run, failed: list[tuple[int, str]]) -> list[tuple[list[_Sample], Any]]:
        """Outputs and the samples that they are of: all at once or, where one makes DALI give up, one by one."""
        try:
            return [(run.samples, self._output(run))]
        except RuntimeError as error:
            self._raise_if_device(error)
            first = error
        outputs = []
        for sample in run.samples:
            try:
                outputs.append(([sample], self._output(self._launch(run.key, [sample]))))
            except RuntimeError as error:
                self._raise_if_device(error)
                failed.append((sample.position, f"DALI cannot decode it: {_reason(error)}"))
        if not outputs and len(run.samples) > 1:
            raise UserError(
                f"DALI decodes none of the {len(run.samples)} clips of a batch ({_reason(first)}); set "
                "data.backend=pyav"
            ) from first
        return outputs

    def _raise_if_device(self, error: RuntimeError) -> None:
        reason = _reason(error)
        if any(part in reason.lower() for part in _DEVICE_TROUBLE):
            where = "GPU" if self._device.type == "cuda" else "CPU"
            raise UserError(
                f"DALI cannot work on the {where} ({reason}); if memory is full lower data.device_prefetch "
                "or the batch size, otherwise set data.backend=pyav"
            ) from error

    def _output(self, run: _Run) -> Any:
        # On a GPU this does not wait for the decoder: the stream does.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (output,) = run.pipeline.outputs(cuda_stream=stream)
        # A pipeline that failed is not used again.
        with self._lock:
            self._idle[run.key].append(run.pipeline)
        return output

    def _resizes_later(self, kind: str) -> bool:
        """Whether a pipeline ends with the crop."""
        return kind == "jpeg" and self._device.type == "cpu"

    def _one_by_one(self, kind: str, samples: Sequence[_Sample], output: Any) -> list[Tensor]:
        """The decoded frames of every sample, uint8 [U, H, W, 3]."""
        if kind == "video":
            return [torch.from_dlpack(output[number]) for number in range(len(samples))]
        if not self._resizes_later(kind):
            flat = torch.from_dlpack(output.as_tensor())
            return list(flat.split([len(sample.files) for sample in samples]))
        numbers = iter(range(len(output)))
        return [
            resize_clip(
                torch.stack([torch.from_dlpack(output[next(numbers)]) for _ in sample.files]).numpy(),
                self._size,
                sample.clip.flip,
            )
            for sample in samples
        ]

    def _build(self, key: tuple[str, int]) -> Any:
        from nvidia.dali import Pipeline, fn, types

        kind, num_frames = key
        on_gpu = self._device.type == "cuda"
        batch_size = self._batch_size * (num_frames if kind == "jpeg" else 1)
        out_bytes = self._size[0] * self._size[1] * 3 * (num_frames if kind == "video" else 1)
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            corner, shape = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("corner", "shape"))
            cut = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
            device = "mixed" if on_gpu else "cpu"
            # As the reference, which ignores orientation metadata.
            image = {"device": device, "output_type": types.RGB, "adjust_orientation": False}
            if self._resizes_later(kind):
                pipeline.set_outputs(fn.decoders.image_slice(files, corner, shape, **cut, **image))
                pipeline.build()
                return pipeline
            if kind == "video":
                wanted = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
                frames = fn.decoders.video(files, frames=wanted, device=device)
            else:
                frames = fn.decoders.image(files, **image)
            # Cut out first: as a region of interest alone, an enlarged crop would blend in what lies around it.
            frames = fn.slice(frames, corner, shape, **cut)
            start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end"))
            # The hint lets the output be allocated once: DALI's memory is not torch's, and grows by doubling.
            pipeline.set_outputs(
                fn.resize(
                    frames,
                    size=list(self._size),
                    roi_start=start,
                    roi_end=end,
                    antialias=False,
                    interp_type=types.INTERP_LINEAR,
                    bytes_per_sample_hint=out_bytes,
                )
            )
        pipeline.build()
        return pipeline


def _as_whole(samples: Sequence[_Sample], output: Any) -> Tensor | None:
    """The output as one tensor, without a copy; None if frames have to be repeated or put in another order."""
    for sample in samples:
        count = len(sample.files) if sample.clip.frames is None else len(sample.clip.frames)
        if count != len(sample.clip.places) or not np.array_equal(sample.clip.places, np.arange(count)):
            return None
    return torch.from_dlpack(output.as_tensor())


def _reason(error: RuntimeError) -> str:
    """What DALI's message says happened, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() not in ("", _LAST_LINE)]
    starts = [number for number, before in enumerate(lines[:-1], 1) if before == "encountered:"]
    rest = iter(lines[starts[0] if starts else 0 :])
    reason = next(rest, "no reason given")
    while reason.endswith(":") and (more := next(rest, None)) is not None:
        reason = f"{reason} {more}"
    # A failed image ends in a colon with nothing behind it.
    return reason.rstrip(" :")
