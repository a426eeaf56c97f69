"""Shared by all sections of a config: value types and strict validation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Range = tuple[float, float]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Checkpointing = Literal["none", "full", "selective"]
Switch = Literal[True, False, "auto"]


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """One name for a list of one. To YAML, `synthetic:` without quotes is a mapping with an empty value."""
    values = value if isinstance(value, list) else [value] if isinstance(value, (str, dict)) else None
    if values is None:
        return value
    return [f"{next(iter(v))}:" if isinstance(v, dict) and list(v.values()) == [None] else v for v in values]


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(arg is True or _takes_bool(arg) for arg in get_args(annotation))


Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_pair)]


class Section(BaseModel):
    """Unknown keys are errors, and so are infinities, not-a-number and true or false where a number belongs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _reject_bool(cls, value: Any) -> Any:
        """YAML turns a bare `on` or `yes` into true, which would then pass for the number 1."""
        if isinstance(value, dict):
            for name, given in value.items():
                field = cls.model_fields.get(name)
                if isinstance(given, bool) and field is not None and not _takes_bool(field.annotation):
                    raise ValueError(f"{name} is {str(given).lower()}; it does not take true or false")
        return value
