"""Launches of tensors on a CPU, made on a GPU: so the tests of the interpreter are those of a GPU as well."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on(device: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, Triton's launch of a kernel, with copies of all tensors on the device, whose numbers come back."""

    def run_there(kernel: Any, *arguments: Any, **options: Any) -> Any:
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def moved(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if id(argument) not in copies:  # a tensor may stand in for one that a kernel does not need
                there = torch.empty_strided(
                    argument.shape, argument.stride(), dtype=argument.dtype, device=device
                ).copy_(argument)
                copies[id(argument)] = argument, there
            return copies[id(argument)][1]

        result = run(kernel, *map(moved, arguments), **options)
        for here, there in copies.values():
            here.copy_(there)
        return result

    return run_there
