"""The shortcut's experts as three steps, between which a layer runs its dense path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_core.layers.routing import Routing


class Branch(ABC):
    """The FFN experts of one layer. Each step gets what the one before returned, which only it can read."""

    @abstractmethod
    def begin(self, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        """hidden_states: [T, H]; between: what is read after this step, of which `hidden_states` may be a part."""

    @abstractmethod
    def compute(self, begun: Tensor, between: Tensor) -> Tensor:
        """between: what else is made before this step, and read after it."""

    @abstractmethod
    def end(self, computed: Tensor, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        """The FFN experts' share, [T, H]. It gets again what `begin` got, which so stays in memory until here.
        between: as of `compute`."""


class InARow(Branch):
    """Another's steps, with nothing between them."""

    def __init__(self, branch: Branch) -> None:
        self._branch = branch

    def begin(self, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        begun = self._branch.begin(hidden_states, routing, between)
        computed = self._branch.compute(begun, between=hidden_states)
        return self._branch.end(computed, hidden_states, routing, between=hidden_states)

    def compute(self, begun: Tensor, between: Tensor) -> Tensor:
        return begun

    def end(self, computed: Tensor, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        return computed
