"""Which tensors of a published checkpoint are in FP8, by its `config.json`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PUBLISHED_BLOCK = (128, 128)
"""Rows and columns of a weight that share a scale in every FP8 release (report, section 5)."""

_LINEAR = re.compile(r".*_proj(_with_mqa)?\.weight")
"""Published weights that an FP8 release may have in FP8: never embeddings, norms, the head or the router."""


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` and `disable_quant_module` of a `config.json` say of a checkpoint's weights."""

    method: str
    """`quant_method`: "fp8" is served, others are known by name."""
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    block: tuple[int, int] = PUBLISHED_BLOCK
    has_blocks: bool = True
    """Whether `weight_block_size` is there; engines take a release without it to have one scale for a whole weight."""
    ignored: tuple[str, ...] = ()
    """Modules in bf16, by published names: linear layers, or what they are part of."""
    disabled: tuple[str, ...] = ()
    """Kinds of modules in bf16: "self_attn", "mlps" or "mtp"."""

    def problems(self) -> list[str]:
        """Why this package cannot read such a checkpoint, each with the value met and the value wanted."""
        if self.method != "fp8":
            return [f"quant_method: {self.method!r}, wanted 'fp8'"]
        found = []
        if self.fmt != "e4m3":
            found.append(f"fmt: {self.fmt!r}, wanted 'e4m3'")
        if self.activation_scheme != "dynamic":
            found.append(f"activation_scheme: {self.activation_scheme!r}, wanted 'dynamic'")
        if not self.has_blocks:
            found.append(f"weight_block_size: none, wanted two numbers such as {list(PUBLISHED_BLOCK)}")
        return found

    def is_fp8(self, name: str) -> bool:
        """Whether a published tensor is a weight in FP8; of the MTP layer the tensors that are there decide."""
        if not _LINEAR.fullmatch(name):
            return False
        kinds = {"self_attn": ".self_attn.", "mlps": ".mlps.", "mtp": "model.mtp."}
        if any(kinds.get(kind, kind) in name for kind in self.disabled):
            return False
        module = name.removesuffix(".weight")
        # Engines let the prefix `model.` be left out.
        return self._ignored.isdisjoint([*_with_parents(module), *_with_parents(module.removeprefix("model."))])

    @cached_property
    def _ignored(self) -> frozenset[str]:
        """A release lists thousands of modules, and has tens of thousands of tensors."""
        return frozenset(self.ignored)


def read_quantization(raw: Mapping[str, Any], problems: list[str]) -> Quantization | None:
    """From a `config.json`; None if there is no `quantization_config`. What is malformed is added to `problems`."""
    found, disabled = raw.get("quantization_config"), _names(raw, "disable_quant_module", problems)
    if not found:
        return None
    if not isinstance(found, Mapping):
        problems.append(f"quantization_config: {found!r}, wanted an object")
        return None
    given = found.get("weight_block_size")
    block = list(PUBLISHED_BLOCK) if given is None else given
    if not (isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        problems.append(f"weight_block_size: {block!r}, wanted two positive integers")
        block = PUBLISHED_BLOCK
    ignored = [*_names(found, "ignored_layers", problems), *_names(found, "modules_to_not_convert", problems)]
    return Quantization(
        method=str(found.get("quant_method", "")),
        fmt=str(found.get("fmt", "e4m3")).removeprefix("float8_"),
        activation_scheme=str(found.get("activation_scheme", "dynamic")),
        block=(int(block[0]), int(block[1])),
        has_blocks=given is not None,
        ignored=tuple(sorted({name.removesuffix(".weight") for name in ignored})),
        disabled=disabled,
    )


def quantization_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that say its quantisation, as they are: engines read more of them than core."""
    return {name: raw[name] for name in ("quantization_config", "disable_quant_module") if name in raw}


def published_quantization(quantization: Quantization) -> dict[str, Any]:
    """The fields of a `config.json`; `read_quantization` reads them back unchanged."""
    found: dict[str, Any] = {
        "quant_method": quantization.method,
        "fmt": quantization.fmt,
        "activation_scheme": quantization.activation_scheme,
        "ignored_layers": list(quantization.ignored),
    }
    if quantization.has_blocks:
        found["weight_block_size"] = list(quantization.block)
    disabled = {"disable_quant_module": list(quantization.disabled)} if quantization.disabled else {}
    return {"quantization_config": found, **disabled}


def _with_parents(module: str) -> Iterator[str]:
    """A module's name, and the names of all that it is part of."""
    parts = module.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _names(raw: Mapping[str, Any], field: str, problems: list[str]) -> tuple[str, ...]:
    found = raw.get(field) or ()
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        problems.append(f"{field}: {found!r}, wanted a list of names")
        return ()
    return tuple(found)
