"""What all sections of a recipe share: closed to unknown keys, frozen, and strict about numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_boolean(value: Any) -> Any:
    """`true` is not 1.0: pydantic would take it for a number."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]
_MAX_INT = 2**31 - 1  # of every count and seed: what lies above is a slip, and overflows somewhere
PositiveInt = Annotated[int, Field(gt=0, le=_MAX_INT, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_INT, strict=True)]
NonNegativeFloat = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=False)
