"""What a decoding process prints of its own end."""

from __future__ import annotations

import sys

import pytest

from vjepa_fast.data.workers import _report


def report(error: BaseException) -> None:
    try:
        raise error
    except BaseException:
        _report(*sys.exc_info())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), BrokenPipeError()])
def test_connection_that_ends_is_no_news(error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    report(error)
    assert capfd.readouterr().err == ""


def test_anything_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    report(ZeroDivisionError("by zero"))
    assert "ZeroDivisionError: by zero" in capfd.readouterr().err
