"""Which implementation runs, as a compiler sees it."""

from __future__ import annotations

import subprocess
import sys

import torch

from vjepa_fast.ops.attention import op
from vjepa_fast.ops.triton_support import dispatch


def test_constants_of_a_compiled_region_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert dispatch.constant_result(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert ours.__dict__ == theirs.__dict__ != {}
    for function in (dispatch._choose, op._traced_choice):
        assert theirs.__dict__.items() <= function.__dict__.items()


def test_a_model_is_imported_without_the_compiler() -> None:
    code = "import sys, vjepa_fast as vf; vf.VJEPA, vf.load, vf.MaskSampler; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
