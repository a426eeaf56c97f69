"""What the tests of DALI share."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from tests.data.conftest import picture
from vjepa_fast.data.decode import dali
from vjepa_fast.data.decode.dali import DaliPreparer
from vjepa_fast.data.decode.dali_pipelines import DaliFinisher
from vjepa_fast.data.decode.request import ClipRequest

CPU = torch.device("cpu")
missing = dali.missing(CPU)
needs_dali = pytest.mark.skipif(missing is not None, reason=str(missing))


def run(requests: list[ClipRequest], preparer: DaliPreparer | None = None) -> torch.Tensor:
    preparer = preparer or DaliPreparer(on_gpu=False)
    finisher = DaliFinisher(CPU, requests[0].size, len(requests), 1, 1, False)
    finished = finisher.wait(finisher.start(preparer.collate([preparer.prepare(request) for request in requests])))
    assert finished.failed == []
    return finished.clips


def jpegs(count: int) -> Iterator[bytes]:
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(picture(number, 48, 64)).save(file, "jpeg", quality=92)
        yield file.getvalue()
