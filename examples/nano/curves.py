"""What one step of a training run did, and what was recorded of a run."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Curves:
    """What was recorded of a run: one entry for each recorded step, in nats a token where it is a loss."""

    step: list[int]
    loss: list[float]
    draft_loss: list[float | None]
    """Of the first draft, as a guess at what the model itself says likeliest; None before there is a draft layer."""
    balance_loss: list[float | None]
    """Summed over the layers, without its coefficient."""
    ffn_experts: list[list[float]]
    """Mean a token, by layer."""
    imbalance: list[list[float]]
    """The busiest FFN expert over the mean, by layer."""
    device_imbalance: list[list[float]]
    """The busiest device's FFN experts over the mean, by layer."""
    tokens_per_second: list[float]
    glanced: list[int]
    """The steps after which held-out text was glanced at."""
    held_out_loss: list[float]
    agreement: list[float | None]
    """See `measure.Agreement.drafts`."""

    @classmethod
    def empty(cls) -> Curves:
        return cls(*([] for _ in fields(cls)))

    def note(self, step: int, measured: Measured, tokens_per_second: float) -> None:
        self.step.append(step)
        self.loss.append(measured.loss)
        self.draft_loss.append(measured.draft_loss)
        self.balance_loss.append(measured.balance_loss)
        self.ffn_experts.append(measured.ffn_experts)
        self.imbalance.append(measured.imbalance)
        self.device_imbalance.append(measured.device_imbalance)
        self.tokens_per_second.append(tokens_per_second)

    def note_glance(self, step: int, loss: float, agreement: float | None) -> None:
        self.glanced.append(step)
        self.held_out_loss.append(loss)
        self.agreement.append(agreement)


@dataclass(frozen=True)
class Measured:
    """What one step did."""

    loss: float
    draft_loss: float | None
    balance_loss: float | None
    ffn_experts: list[float]
    imbalance: list[float]
    device_imbalance: list[float]
