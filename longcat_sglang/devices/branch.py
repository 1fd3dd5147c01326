"""When a layer's MoE runs: it is begun after the first attention, and wanted at the layer's end."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_core.layers.experts import Shortcut


class Begun(NamedTuple):
    """A layer's MoE between its two steps."""

    shortcut: Shortcut
    """Not to be read before `Branch.end`."""
    done: Any = None
    """What the device waits for; None if there is nothing to wait for."""
    hidden_states: Tensor | None = None
    """[T, H]: what is still read, and so has to stay in memory until `Branch.end`."""


class Branch(ABC):
    """Without a sum over ranks in either step: that is made of the shortcut and the second dense FFN at once."""

    @abstractmethod
    def begin(self, moe: Callable[[Tensor], Shortcut], hidden_states: Tensor) -> Begun:
        """hidden_states: [T, H]."""

    @abstractmethod
    def end(self, begun: Begun) -> Shortcut:
        """What was begun, to be read by what comes next."""


class InARow(Branch):
    """All of it before anything else."""

    def begin(self, moe: Callable[[Tensor], Shortcut], hidden_states: Tensor) -> Begun:
        return Begun(moe(hidden_states))

    def end(self, begun: Begun) -> Shortcut:
        return begun.shortcut
