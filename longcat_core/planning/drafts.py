"""What drafts of the MTP layer bring and cost: tokens a step, rows to verify, with or without a draft gate (C2T)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass

GATE_KEEPS = 0.63
"""Of all drafts: C2T on a chain, with an MTP layer and threshold 0.8, verifies 37 % fewer (arXiv 2502.13652)."""
GATE_LENGTH = 2.10 / 2.12
"""Of the accepted length, in the same experiment."""


@dataclass(frozen=True)
class Drafts:
    """A chain of `count` drafts a step, each accepted with the same probability if the one before it was."""

    count: int = 0
    acceptance: float = 0.0
    has_gate: bool = False

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.acceptance <= 1:
            raise ValueError(f"drafts: {self.count} with acceptance {self.acceptance}, wanted 0 to 1")

    @property
    def rows(self) -> float:
        """A request's in a step of the main model: its last token and the drafts that are verified."""
        return 1 + self.count * (GATE_KEEPS if self.has_gate else 1)

    @property
    def tokens_a_step(self) -> float:
        """Of a request: the main model's own token and the drafts accepted."""
        length = sum(self.acceptance**n for n in range(self.count + 1))
        return max(1.0, length * GATE_LENGTH) if self.has_gate and self.count else length
