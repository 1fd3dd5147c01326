"""What the ranks of an engine tell each other in a forward pass: which collectives, and what reads the sums."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

COLLECTIVES = ("all_reduce", "all_gather", "all_gatherv", "reduce_scatter", "reduce_scatterv", "broadcast")


class Pass(NamedTuple):
    """One forward pass of the model on one rank."""

    collectives: dict[str, int]
    sums_into_a_norm: int
    """Results of `all_reduce` that are the input of a norm, as they are."""


def note(file: Path, group: type, model: type, norm: type, patch: pytest.MonkeyPatch) -> None:
    """Append every forward pass of a model to a file, from every rank, which is another process.

    group, norm: the engine's classes of a group of ranks and of RMS norms.
    """
    sums: list[torch.Tensor] = []
    seen: Counter[str] = Counter()

    def counted(name: str) -> Any:
        run = getattr(group, name)

        def run_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = run(self, *args, **kwargs)
            if self.world_size > 1:
                seen[name] += 1
                if name == "all_reduce":
                    sums.append(result)
            return result

        return run_and_count

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        sums.clear()
        result = whole(self, *args, **kwargs)
        into_a_norm = seen.pop("into a norm", 0)
        with file.open("a") as notes:
            notes.write(json.dumps(Pass(dict(seen), into_a_norm)) + "\n")
        return result

    def before(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, norm):
            seen["into a norm"] += any(inputs[0] is each for each in sums)

    whole = model.forward
    for name in COLLECTIVES:
        patch.setattr(group, name, counted(name))
    patch.setattr(model, "forward", forward)
    torch.nn.modules.module.register_module_forward_pre_hook(before)


def noted(file: Path) -> list[Pass]:
    """Those of all ranks so far."""
    return [Pass(*json.loads(line)) for line in file.read_text().splitlines()]
