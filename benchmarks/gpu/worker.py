"""The process of one stage: it sends each row as it comes, so that the stage can be ended at any time."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
import triton

from benchmarks.gpu.cases import Context, Row
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.gpu.stages import device, layer, moe, parity, pieces, rank, tiles, vllm
from benchmarks.gpu.timing import timer

STAGES: dict[str, Callable[[Context], Iterator[Row]]] = {
    "device": device.stage,
    "parity": parity.kernels,
    "pieces": pieces.stage,
    "moe": moe.stage,
    "tiles": tiles.stage,
    "layer": layer.stage,
    "rank": rank.stage,
    "vllm": vllm.stage,
    "engine parity": parity.engines,
}


def run(stage: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    """Send the device's name, then the rows of the stage that are not in `done`.

    Raises:
        RuntimeError: if there is no GPU, and the sizes are not tiny.
    """
    os.setsid()  # so that what the stage starts can be ended with it
    if is_tiny:
        prepare_interpreter()
    elif not torch.cuda.is_available():
        raise RuntimeError("no GPU: torch.cuda.is_available() is false; --tiny runs tiny sizes on a CPU")
    torch.manual_seed(0)
    where = torch.device("cpu" if is_tiny else "cuda")
    sizes = TINY if is_tiny else FULL
    name = "Triton's interpreter on a CPU" if is_tiny else torch.cuda.get_device_name()
    rows.send({"device": name})
    for row in STAGES[stage](Context(sizes, where, name, timer(where, sizes.read_bytes), done)):
        rows.send(row)
    rows.send({"complete": True})


def prepare_interpreter() -> None:
    """Its faults in bf16 and FP8 are put right as for the tests of the kernels."""
    from tests.kernels import interpreter

    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 is set before Triton is imported"
    torch.set_num_threads(1)
    interpreter.repair()
