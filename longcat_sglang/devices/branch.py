"""A layer's MoE as three steps, between which the layer runs its dense path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_core.layers.experts import Shortcut
    from longcat_core.layers.routing import Routing
    from longcat_sglang.moe import LongcatMoE


class Begun(NamedTuple):
    """A layer's MoE between two of its steps."""

    shortcut: Shortcut | None = None
    """Not to be read before `Branch.end`; None where experts are not computed yet, or their sums not back."""
    hidden_states: Tensor | None = None
    """[T, H]: what is still read, and so has to stay in memory until `Branch.end`."""
    routing: Routing | None = None
    """Of these, where that is still read too."""
    pending: Any = None
    """What the device waits for, or keeps in memory, until `Branch.end`."""


class Branch(ABC):
    """Without a sum over ranks in any step: that is made of the shortcut and the second dense FFN at once."""

    @abstractmethod
    def begin(self, moe: LongcatMoE, hidden_states: Tensor, choices: list[Tensor] | None) -> Begun:
        """hidden_states: [T, H]; choices: where the ids of the routing are to be noted."""

    def compute(self, moe: LongcatMoE, begun: Begun) -> Begun:
        """What waits for other ranks' tokens; nothing where none come."""
        return begun

    @abstractmethod
    def end(self, moe: LongcatMoE, computed: Begun) -> Shortcut:
        """What was begun, to be read by what comes next."""


class InARow(Branch):
    """All of it before anything else."""

    def begin(self, moe: LongcatMoE, hidden_states: Tensor, choices: list[Tensor] | None) -> Begun:
        return Begun(moe(hidden_states, choices))

    def end(self, moe: LongcatMoE, computed: Begun) -> Shortcut:
        assert computed.shortcut is not None, "it was the first step"
        return computed.shortcut
