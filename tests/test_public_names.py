"""The names that `import vjepa_fast` promises."""

from __future__ import annotations

import pytest

import vjepa_fast


@pytest.mark.parametrize("name", vjepa_fast.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(vjepa_fast, name) is not None
    assert name in dir(vjepa_fast)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vjepa_fast.nothing
