"""What a step of an engine launches on the null GPU, in all and in each decoder layer."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from longcat_core.null_gpu import launches
from longcat_core.null_gpu.elsewhere import streams
from longcat_core.planning.dry_run import Operation, Step


@dataclass
class Executed:
    """One step, while it is counted."""

    tokens: int
    requests: int
    launches: Counter[str] = field(default_factory=Counter)
    in_layers: list[Counter[str]] = field(default_factory=list)
    beside: list[Counter[str]] = field(default_factory=list)
    """Of those in layers, on another stream than the step's."""
    unordered: list[int] = field(default_factory=list)
    """Of those beside, launched before their stream waited for the step's, or not waited for within the layer."""

    def finished(self, name: str) -> Step:
        operations = [
            Operation(
                launches.kind_of(kernel),
                kernel,
                count,
                tuple(layer[kernel] for layer in self.in_layers),
                tuple(layer[kernel] for layer in self.beside),
            )
            for kernel, count in self.launches.most_common()
        ]
        return Step(name, self.tokens, self.requests, tuple(operations), tuple(self.unordered))


@contextmanager
def counting(step: Executed, model: nn.Module) -> Iterator[None]:
    """Add what is launched while this lasts; more than once for a step that is run in parts. Layers are counted where
    they are called as modules, so not where they are compiled."""
    layers = decoder_layers(model)
    step.in_layers = step.in_layers or [Counter() for _ in layers]
    step.beside = step.beside or [Counter() for _ in layers]
    step.unordered = step.unordered or [0 for _ in layers]
    before: dict[int, tuple[Counter[str], Counter[str]]] = {}

    with streams() as elsewhere:

        def enter(layer: nn.Module, *_: Any) -> None:
            before[id(layer)] = launches.counted(), elsewhere.launched.copy()
            elsewhere.begin()

        def leave(layer: nn.Module, *_: Any) -> None:
            launched, on_other_streams = before.pop(id(layer))
            step.in_layers[layers.index(layer)] += launches.counted() - launched
            step.beside[layers.index(layer)] += elsewhere.launched - on_other_streams
            step.unordered[layers.index(layer)] += elsewhere.unordered()

        handles = [layer.register_forward_pre_hook(enter) for layer in layers]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        start = launches.counted()
        try:
            yield
        finally:
            step.launches += launches.counted() - start
            for handle in handles:
                handle.remove()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Those of this pipeline stage."""
    longest: list[nn.Module] = []
    for name, module in model.named_modules():
        if name.endswith("layers") and isinstance(module, nn.ModuleList) and len(module) > len(longest):
            longest = list(module)
    return [layer for layer in longest if any(True for _ in layer.parameters())]
