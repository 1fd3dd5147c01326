"""What a user requests of longcat-serving itself, among the options of an engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longcat_core.plugin.engine import refuse
from longcat_core.target_by_queue import Target

_CHOICE = "true or false"
KINDS = {
    "ffn_experts": "a number above 0, or two of them",
    "full_queue": "a whole number above 0",
    "init_expert_location": "a file",
    "eplb": "an object",
}
"""Of fields of `Requested`; all others are true or false."""


@dataclass(frozen=True)
class Requested:
    draft_gate: bool = False
    """Drafts are verified only where the checkpoint's draft gate lets them pass."""
    kernels: bool = False
    """On a GPU, router and experts are computed by `longcat_core.kernels`."""
    flashinfer_mla: bool = False
    """On Hopper, decode steps attend by FlashInfer's MLA. SGLang has an option of its own for that."""
    overlap: bool | None = None
    """The experts of a layer run beside its dense path. If nothing is said, the device decides."""
    ffn_experts: Target | None = None
    """The mean of FFN experts a token at which a dial holds every layer, or its bounds; there is no dial if nothing is
    said."""
    full_queue: int | None = None
    """Requests that wait where the lesser of two bounds is the target. If nothing is said, as many as run at most."""
    init_expert_location: str | None = None
    """A file that says where experts are, see `longcat_core.parallel.location`. SGLang has an option of that name."""
    eplb: Mapping[str, Any] | None = None
    """On a CPU, experts move between ranks while vLLM serves, as its --eplb-config says. SGLang has options of its own
    for that."""

    @classmethod
    def read(cls, given: Any, names: Collection[str], prefix: str, option: str) -> Requested:
        """
        given: what was requested, by field; names: of the fields that the engine knows; prefix: before a field's name,
        as typed; option: that the fields are in.

        Raises:
            ValueError: for another name or value.
        """
        wanted = " or ".join(f"{prefix}{name}" for name in names)
        if not isinstance(given, Mapping):
            kinds = "".join(f", {prefix}{name} {KINDS[name]}" for name in names if name in KINDS)
            refuse([f"{option}: {given!r} for longcat, wanted {wanted} in it, each {_CHOICE}{kinds}"])
        problems = [f"{prefix}{name}: wanted {wanted}; correct {option}" for name in given if name not in names]
        problems += [
            f"{prefix}{name}: {value!r}, wanted {KINDS.get(name, _CHOICE)}; correct {option}"
            for name, value in given.items()
            if name in names and not _fits(name, value)
        ]
        refuse(problems)
        requested = cls(**given)
        if requested.full_queue is not None and not requested.follows_queue:
            refuse([f"{prefix}full_queue: it is for two bounds; give {prefix}ffn_experts two numbers, or leave it out"])
        return requested

    @property
    def follows_queue(self) -> bool:
        """Whether a dial is to move its target between two bounds."""
        return isinstance(self.ffn_experts, Sequence)


def _fits(name: str, value: Any) -> bool:
    if name == "ffn_experts":
        return _is_positive(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value)))
    if name == "full_queue":
        return _is_positive(value) and isinstance(value, int)
    return isinstance(value, {"init_expert_location": str, "eplb": Mapping}.get(name, bool))


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def refuse_what_the_own_class_lacks(
    engine: str, reasons: Sequence[str], requested: Requested, options: Mapping[str, str]
) -> None:
    """A request must not be lost where a model is left to the engine's own class.

    options: of each field of `Requested`, as typed.

    Raises:
        ValueError: if there is one.
    """
    why = "; ".join(reasons)
    refuse(
        [
            f"{option}: {engine}'s own class, which serves here as {why}, does not have it; leave it out"
            for name, option in options.items()
            if getattr(requested, name) not in (None, False)
        ]
    )
