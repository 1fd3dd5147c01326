"""Faults in a layer's overlap, for dry runs of SGLang: `--forward-hooks` calls what is here in the run's process."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Hook = Callable[..., None]


def join_left_out(_: dict[str, Any]) -> Hook:
    from longcat_sglang.devices.branch import InARow
    from longcat_sglang.devices.cuda.overlap import SecondStream

    SecondStream.end = InARow.end  # type: ignore[method-assign]
    return nothing


def sum_in_the_branch(_: dict[str, Any]) -> Hook:
    from sglang.srt.distributed import tensor_model_parallel_all_reduce

    from longcat_core.layers.experts import Shortcut
    from longcat_sglang.moe import LongcatMoE

    compute = LongcatMoE.forward

    def forward(self: LongcatMoE, hidden_states: Tensor, choices: list[Tensor] | None = None) -> Shortcut:
        shortcut = compute(self, hidden_states, choices)
        return shortcut._replace(partial=tensor_model_parallel_all_reduce(shortcut.partial))

    LongcatMoE.forward = forward  # type: ignore[method-assign]
    return nothing


def nothing(*_: Any) -> None:
    """SGLang registers what it gets."""
