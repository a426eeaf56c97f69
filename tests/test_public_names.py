"""The names that `import vjepa_fast` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vjepa_fast


@pytest.mark.parametrize("name", vjepa_fast.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(vjepa_fast, name) is not None
    assert name in dir(vjepa_fast)


def test_names_of_interop() -> None:
    command = (
        "import vjepa_fast as vf; vf.interop.meta.MaskCollator; vf.interop.meta.load_checkpoint; "
        "vf.interop.meta.save_checkpoint; vf.interop.huggingface.to_hf; vf.interop.huggingface.from_hf"
    )
    subprocess.run([sys.executable, "-c", command], check=True, timeout=120)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vjepa_fast.nothing
