"""Turns pydantic's errors into sentences: the key, the value seen, the values accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import ValidationError

from vjepa_fast.config.schema import Config, MaskSpec, Section
from vjepa_fast.config.yaml_io import describe

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text; put it in quotes",
    "path": "a path",
    "list": "a list, as in [1, 2]",
    "tuple": "a list, as in [1, 2]",
    "model": "a section with keys below it",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
}
"""By pydantic's error type or its part before the first underscore."""


def _walk(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        annotation = field.annotation
        # A section that may be left out is one or None.
        sections = [
            one
            for one in (annotation, *get_args(annotation))
            if isinstance(one, type) and issubclass(one, Section) and one is not MaskSpec
        ]
        if sections:
            yield from _walk(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name
            if MaskSpec in get_args(annotation):
                yield from _walk(MaskSpec, f"{prefix}{name}.0.")


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of the schema; entries of a list of sections under index 0."""
    return tuple(_walk(Config, ""))


def suggest(key: str, known: tuple[str, ...] | None = None) -> str:
    """`; did you mean x?` for the nearest key, or an empty string when none is near."""
    known = known_keys() if known is None else known
    last = key.rsplit(".", 1)[-1]
    by_last = {other.rsplit(".", 1)[-1]: other for other in reversed(known)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if last in by_last and not near:
        near = [by_last[last]]
    if not near:
        near = [by_last[match] for match in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def _sentence(error: Any) -> tuple[str, str]:
    """(dotted key, sentence) of one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"])
    kind, seen = error["type"], error["input"]
    if kind == "extra_forbidden":
        return key, f"{key} is not a key{suggest(key)}"
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        first = text.split(" ", 1)[0]
        names = {known.rsplit(".", 1)[-1] for known in known_keys()}
        # Validators of a section start with the bare name of the key.
        if key and first in names:
            return f"{key}.{first}", f"{key}.{text}"
        return key, f"{key}: {text}" if key else text
    if kind == "missing":
        key = ".".join(str(part) for part in error["loc"][:-1])
        return key, f"{key} is {describe(seen)}; expected more entries"
    expected = _EXPECTED.get(kind) or _EXPECTED.get(kind.split("_")[0])
    if expected is None:
        return key, f"{key} is {describe(seen)}; {error['msg']}"
    return key, f"{key} is {describe(seen)}; expected {expected.format(**error.get('ctx', {}))}"


def explain(error: ValidationError, source: str, overrides: dict[str, str]) -> str:
    """The message of a ConfigError.

    Args:
        error: what pydantic found.
        source: the file or recipe, named at the front.
        overrides: dotted key -> the override as the user wrote it; named where it is the cause.
    """
    sentences = []
    for item in error.errors(include_url=False):
        key, sentence = _sentence(item)
        cause = next((text for name, text in overrides.items() if f"{key}.".startswith(f"{name}.")), None)
        sentences.append(f"{sentence} (from {cause})" if cause else sentence)
    if len(sentences) == 1:
        return f"{source}: {sentences[0]}"
    return f"{source}: {len(sentences)} problems:" + "".join(f"\n  - {sentence}" for sentence in sentences)
