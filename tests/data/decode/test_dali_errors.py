"""What is made of DALI's messages; DALI itself is not needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.dali import EncodedClip
from vjepa_fast.data.decode.dali_pipelines import DaliFinisher, _reason, _Run, _Sample
from vjepa_fast.data.sampling import Box

END = "Current pipeline object is no longer valid."
DAMAGED = "CUDA driver API error CUDA_ERROR_INVALID_VALUE (1):\ninvalid argument"
CUVID = "CUDA error in cuvidParseVideoData: CUDA_ERROR_UNKNOWN"
FULL = "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory"


def message(reason: str) -> RuntimeError:
    return RuntimeError(
        "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.video`,\nwhich was used in the "
        f"pipeline definition with the following traceback:\n\n  File 'x.py'\n\nencountered:\n\n{reason}\n{END}\n{END}"
    )


def collect(monkeypatch: pytest.MonkeyPatch, reasons: dict[int, str], count: int = 3) -> tuple[list[int], list[Any]]:
    """Positions of the clips that came out, and the failed ones, where DALI gives up on some positions."""
    finisher = DaliFinisher(torch.device("cpu"), (8, 8), count, 1, 1, False)

    def output(run: _Run) -> str:
        for sample in run.samples:
            if sample.position in reasons:
                raise message(reasons[sample.position])
        return "pixels"

    monkeypatch.setattr(finisher, "_output", output)
    monkeypatch.setattr(finisher, "_launch", lambda key, samples: _Run(key, samples, None))
    clip = EncodedClip([], np.zeros(1, np.int32), np.zeros(1, np.int64), Box(0, 0, 8, 8), False)
    failed: list[Any] = []
    run = _Run(("video", 1), [_Sample(position, clip, []) for position in range(count)], None)
    return [sample.position for samples, _ in finisher._collect(run, failed) for sample in samples], failed


@pytest.mark.parametrize("reason", [DAMAGED, CUVID, "Could not allocate the av frame"])
def test_damaged_video_on_a_gpu_costs_itself_alone(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    came, failed = collect(monkeypatch, {1: reason})
    assert came == [0, 2]
    assert failed == [(1, f"DALI cannot decode it: {' '.join(reason.split())}")]


@pytest.mark.parametrize(
    "reason",
    [
        FULL,
        "CUDA allocation failed",
        "Can't allocate 100 bytes on host.",
        "Failed to load libnvcuvid.so, needed by",
        "CUDA driver API error CUDA_ERROR_NO_DEVICE (100):\nno CUDA-capable device is detected",
        "CUDA runtime API error cudaErrorInitializationError (3):\ninitialization error",
    ],
)
def test_trouble_of_the_device_stops_and_names_it(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="DALI cannot work on the CPU") as error:
        collect(monkeypatch, {1: reason})
    assert " ".join(reason.split()) in str(error.value) and "GPU" not in str(error.value)


def test_when_all_fail_the_run_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"DALI.*none.*\b3 clips.*invalid argument"):
        collect(monkeypatch, dict.fromkeys(range(3), DAMAGED))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (str(message(DAMAGED)), "CUDA driver API error CUDA_ERROR_INVALID_VALUE (1): invalid argument"),
        (str(message("Failed to decode sample #0 : ")), "Failed to decode sample #0"),
        (str(message("nvImageCodec failure: '#3'")), "nvImageCodec failure: '#3'"),
        ("Assert on 'x' failed:\nno such thing\nmore", "Assert on 'x' failed: no such thing"),
        ("", "no reason given"),
    ],
)
def test_reason_is_one_line(text: str, reason: str) -> None:
    assert _reason(RuntimeError(text)) == reason
