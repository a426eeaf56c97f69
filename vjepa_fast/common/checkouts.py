"""Imports modules from checkouts of facebookresearch/vjepa2 or jepa, several versions in one process."""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _unused_drop_path(*_: Any) -> Any:
    raise AssertionError("these runs have no drop path")


_imported: dict[Path, dict[str, types.ModuleType]] = {}
"""What has been imported from each checkout."""


def _take_out() -> dict[str, types.ModuleType]:
    """The modules of any checkout, which all have the same names, out of sys.modules."""
    names = [name for name in sys.modules if name.split(".")[0] in ("app", "src", "evals")]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def import_environment(root: Path) -> Iterator[None]:
    """Put the checkout and a stand-in for timm in place, and undo that and what its modules do to the root logger.

    Checkouts of several versions can be used in one process, each within an environment of its own.
    """
    layers = types.ModuleType("timm.models.layers")
    layers.drop_path = _unused_drop_path  # type: ignore[attr-defined]
    stand_ins = {name: types.ModuleType(name) for name in ("timm", "timm.models")} | {layers.__name__: layers}
    before = {name: sys.modules.get(name) for name in stand_ins}
    root_logger = logging.getLogger()
    handlers, level = root_logger.handlers[:], root_logger.level
    others = _take_out()
    sys.path.insert(0, str(root))
    sys.modules.update(stand_ins | _imported.get(root, {}))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        _imported[root] = _take_out()
        sys.modules.update(others)
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        root_logger.handlers[:], root_logger.level = handlers, level
