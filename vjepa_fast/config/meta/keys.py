"""Shared by the readers of Meta's YAML files: sections, defaults, missing and unused keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.messages import suggest
from vjepa_fast.config.yaml_io import describe

REQUIRED = object()
"""In place of a default: the reference does not run without the key."""

DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
"""The reference takes every other name for float32."""

OFF = {
    "auto_augment": "data_aug.auto_augment (RandAugment)",
    "reprob": "data_aug.reprob (random erasing)",
    "motion_shift": "data_aug.motion_shift",
}
"""Keys of data_aug that must be off."""


@dataclass
class KeyReader:
    """Reads the sections of one file and notes on the way what is not read and what is missing."""

    source: str
    """Name of the file, for messages."""
    ignored: list[str] = field(default_factory=list)
    """Dotted keys that nothing reads."""
    missing: list[str] = field(default_factory=list)
    """Dotted keys without which the reference does not run."""

    def mapping(self, value: Any, name: str) -> dict[str, Any]:
        """A section.

        Raises:
            ConfigError: it is something else.
        """
        if not isinstance(value, dict):
            raise ConfigError(f"{self.source}: {name} is {describe(value)}; expected a section with keys below it")
        return value

    def section(self, raw: dict[str, Any], name: str, keys: dict[str, Any]) -> dict[str, Any]:
        """All of `keys` (key -> default) of a section of the file.

        Raises:
            ConfigError: there is no such section.
        """
        if name not in raw:
            raise ConfigError(f"{self.source}: the section {name} is missing; the reference does not run without it")
        return self.read({} if raw[name] is None else raw[name], name, keys)

    def masks(self, raw: dict[str, Any], keys: dict[str, Any]) -> list[dict[str, Any]]:
        """All of `keys` of every mask.

        Raises:
            ConfigError: there is no list of masks.
        """
        masks = raw.get("mask")
        if not isinstance(masks, list) or not masks:
            raise ConfigError(f"{self.source}: mask is {describe(masks)}; expected a list with one entry a mask")
        return [self.read(mask, f"mask.{index}", keys) for index, mask in enumerate(masks)]

    def read(self, given: Any, name: str, keys: dict[str, Any]) -> dict[str, Any]:
        """All of `keys`, from the file or their defaults."""
        given = self.mapping(given, name)
        known = tuple(f"{name}.{key}" for key in keys)
        for key in given:
            if key not in keys:
                hint = suggest(f"{name}.{key}", known)
                self.ignored.append(f"{name}.{key}" + (f" ({hint[2:]})" if hint else ""))
        values = {key: given.get(key, default) for key, default in keys.items()}
        self.missing += [f"{name}.{key}" for key, value in values.items() if value is REQUIRED]
        return values

    def top_level(self, raw: dict[str, Any], read: Iterable[str]) -> None:
        """Note the keys of the file itself that are not in `read`."""
        self.ignored[:0] = sorted(str(name) for name in raw if name not in set(read))

    def check_complete(self) -> None:
        """Raises ConfigError where a key is missing."""
        if self.missing:
            raise ConfigError(
                f"{self.source}: missing {', '.join(self.missing)}; the reference has no default for "
                f"{'it' if len(self.missing) == 1 else 'them'}, so the file must say"
            )

    def check_common(self, aug: dict[str, Any], data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Options that are not implemented here; they are taken out of `aug` and `data`.

        Raises:
            ConfigError: one of them is on.
        """
        for key, what in OFF.items():
            if aug.pop(key):
                raise ConfigError(
                    f"{self.source}: {what} is not supported; set it to {'0' if key == 'reprob' else 'false'}"
                )
        kind = data.pop("dataset_type")
        if str(kind).lower() != "videodataset":
            raise ConfigError(f"{self.source}: data.dataset_type is {describe(kind)}; expected VideoDataset")
        if meta["skip_batches"] not in (-1, 0, None):
            raise ConfigError(
                f"{self.source}: meta.skip_batches is {meta['skip_batches']}; expected -1, a resumed run "
                "continues with the clip after the last one by itself"
            )
