"""SamplingParams as plain data, for the way between the processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from tunesmith.engine.request import SamplingParams, StructuredSpec

_DEFAULTS = {f.name: f.default for f in fields(SamplingParams) if f.default is not MISSING}


def params_to_plain(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    plain: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(params, name)
        if value == default:
            continue
        if isinstance(value, StructuredSpec):
            value = {"kind": value.kind, "value": value.value}
        plain[name] = dict(value) if isinstance(value, Mapping) else value
    return plain


def params_from_plain(plain: Mapping[str, Any]) -> SamplingParams:
    """The other way round. Raises RequestError for values that are out of range."""
    values = dict(plain)
    spec = values.get("structured")
    if spec is not None:
        value = spec["value"]
        values["structured"] = StructuredSpec(spec["kind"], value if isinstance(value, str) else tuple(value))
    return SamplingParams(**values)
