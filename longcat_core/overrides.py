"""Fields of a configuration that an engine overrides after it was read, in any spelling of `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longcat_core.config import ConfigError, field_of
from longcat_core.rope import read_rope, rope_to_hf

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def overridden(canonical: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to set in a configuration spelt as `config.canonical_hf` has it, for these overrides.

    A name means what it means in a `config.json`: `num_hidden_layers` counts decoder layers, `rope_scaling` leaves
    `rope_theta` as it is. Sizes are not checked, as one may only fit another that is overridden later.

    Raises:
        ConfigError: for a rotary embedding that cannot be served, or two spellings of one field that differ.
    """
    fields: dict[str, Any] = {}
    for name, value in overrides.items():
        field = field_of(name)
        if field == "num_layers" and name != field and "num_layers" in overrides:
            if value not in (overrides["num_layers"], 2 * overrides["num_layers"]):
                raise ConfigError(f"{name}: {value!r} contradicts num_layers: {overrides['num_layers']!r}; remove one")
        elif fields.get(field, value) != value:
            raise ConfigError(f"{name}: {value!r} contradicts {field}: {fields[field]!r}; remove one")
        elif name not in _ROPE:
            fields[field] = value
    if overrides.keys() & set(_ROPE):
        fields["rope_parameters"] = _rope({**canonical, **fields}, overrides)
    rope_dim = fields.get("qk_rope_head_dim")
    return fields if rope_dim is None else {**fields, "head_dim": rope_dim}


def _rope(canonical: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(canonical["rope_parameters"])
    if "rope_theta" in overrides:
        rope["rope_theta"] = overrides["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        if name in overrides:
            given = overrides[name] or {"rope_type": "default"}
            if not isinstance(given, Mapping):
                raise ConfigError(f"{name}: {given!r}, wanted an object")
            rope = {"rope_theta": rope["rope_theta"], **given}
    problems: list[str] = []
    read = read_rope(
        {"rope_parameters": rope, "max_position_embeddings": canonical.get("max_position_embeddings")}, problems
    )
    if read is None:
        raise ConfigError("not a rotary embedding that can be served:\n  " + "\n  ".join(problems))
    return {"rope_theta": read.theta, **rope_to_hf(read)}
