"""What only a process of its own shows: cost of import, module entry, a closed pipe."""

from __future__ import annotations

import os
import subprocess
import sys

from vjepa_fast import __version__


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload,no-any-return]


def test_import_is_free() -> None:
    result = run(
        "-c",
        "import sys, time; start = time.perf_counter(); import vjepa_fast; "
        "print(time.perf_counter() - start, 'torch' in sys.modules, 'pydantic' in sys.modules)",
    )
    seconds, torch, pydantic = result.stdout.split()
    assert float(seconds) < 1
    assert (torch, pydantic) == ("False", "False")


def test_config_and_command_do_not_wait_for_torch() -> None:
    result = run(
        "-c",
        "import sys, vjepa_fast.cli.main as m; "
        "m.app(['train', '--print-config'], standalone_mode=False); sys.exit('torch' in sys.modules)",
    )
    assert result.returncode == 0, result.stderr


def test_help_imports_no_more_than_it_shows() -> None:
    """The list of verbs needs none of them, and the help of a verb no torch."""
    code = (
        "import sys, vjepa_fast.cli.main as m; m.app({args}, standalone_mode=False); "
        "print([name for name in ('torch', 'numpy', 'pydantic', 'matplotlib') if name in sys.modules])"
    )
    assert run("-c", code.format(args=["--help"])).stdout.splitlines()[-1] == "[]"
    for verb in ("train", "pack", "embed", "probe", "convert", "bench", "masks", "plan", "doctor"):
        last = run("-c", code.format(args=[verb, "--help"])).stdout.splitlines()[-1]
        assert "torch" not in last and "matplotlib" not in last, verb


def test_module_entry() -> None:
    result = run("-m", "vjepa_fast", "--version")
    assert (result.returncode, result.stdout) == (0, f"vjepa-fast {__version__}\n")


def test_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "vjepa_fast", "train", "--print-config"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(writer)
    assert result.stderr == ""


def test_threads_wait_asleep_unless_told_otherwise() -> None:
    code = (
        "import os, vjepa_fast.cli.main as m; m.app = lambda **_: None; m.main(); print(os.environ['OMP_WAIT_POLICY'])"
    )
    given = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    assert run("-c", code, env=given).stdout == "passive\n"
    assert run("-c", code, env={**given, "OMP_WAIT_POLICY": "active"}).stdout == "active\n"
