"""Compile each Triton kernel at LongCat-Flash-Chat's sizes, and read what the machine code needs. No GPU is asked for.

    .venv-vllm/bin/python -m benchmarks.gpu.compile_kernels
    .venv-sglang/bin/python -m benchmarks.gpu.compile_kernels

write what the environment's Triton makes into compiled.json beside this file, or into a file that is named. Nothing is
timed: registers, spills and shared memory say how many programs fit on a multiprocessor at once, the instructions
whether the tensor cores are used, and a tile's bytes and operations whether memory or arithmetic bounds it.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from longcat_core.kernels.arrange import Arrangement, arrange
from longcat_core.kernels.combine import weighted_sum
from longcat_core.kernels.experts import ExpertWeights, expert_outputs
from longcat_core.kernels.quantize import quantize
from longcat_core.kernels.route import route
from longcat_core.kernels.router_product import router_product
from longcat_core.kernels.tiles import DEFAULT, TILES, Tile
from longcat_core.planning.hardware import architecture
from longcat_core.planning.occupancy import programs_at_once

RESULTS = Path(__file__).with_name("compiled.json")
ARCHITECTURES = (90, 100)

H, INNER, E, ZERO, K = 6144, 2048, 512, 256, 12
"""LongCat-Flash-Chat: hidden size, an expert's inner size, FFN experts, zero experts, top K."""
LOCAL = 64
"""FFN experts of one of eight ranks."""

_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_TENSOR_CORE = re.compile(r"\b(HMMA|QMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA)\b")
_WEIGHT = {"gate_up_kernel": 2, "down_kernel": 2, "router_product_kernel": 1}
"""Which argument of a product is a weight. gate_up multiplies by gate and up, the router by a high and a low part."""
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One launch that a function of `longcat_core.kernels` makes."""

    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class TileWork:
    """One step along the depth of a product's tile."""

    bytes: int
    """That a step reads: rows and weights."""
    operations: int
    """Multiplications and additions on the tensor cores."""


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of a launch."""

    warps: int
    """Of a program."""
    registers: int
    """Of a thread; 255 is the most."""
    spilled_bytes: int
    """Of a thread: stack and local memory."""
    shared_bytes: int
    """Of a program."""
    programs_at_once: int
    """On a multiprocessor."""
    tensor_core: dict[str, int]
    """Instructions of tensor cores in the code, by name: HGMMA and QGMMA on sm_90, UTCHMMA and UTCQMMA on sm_100; HMMA
    and QMMA are those of older architectures, with less throughput."""
    tile: TileWork | None
    """None of what is no product."""


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are noted, and not made."""
    launches: list[Launch] = []

    def run(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, arguments, options))

    real = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = real


def compiled(launch: Launch, target: int) -> MachineCode:
    """As the launch would compile it on such a GPU: integers of 1 are constants, divisors of 16 are known."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False))
    given |= {name: value for name, value in launch.options.items() if name in names}
    signature, constants, divisible = {}, {}, {}
    for index, (parameter, name) in enumerate(zip(launch.kernel.params, names, strict=True)):
        value = given[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = _type(value)
            if not isinstance(value, float) and (isinstance(value, Tensor) or value % 16 == 0):
                divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, divisible)
    options = {name: value for name, value in launch.options.items() if name in ("num_warps", "num_stages")}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", _output("cuobjdump", "-res-usage", file.name))
        code = _output("nvdisasm", "-c", file.name)
    assert usage is not None, "cuobjdump says nothing of registers"
    registers, stack, local = map(int, usage.groups())
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return MachineCode(
        warps=warps,
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=shared,
        programs_at_once=programs_at_once(architecture(f"sm_{target}"), warps, registers, shared),
        tensor_core=dict(Counter(_TENSOR_CORE.findall(code))),
        tile=_tile_work(launch),
    )


def _tile_work(launch: Launch) -> TileWork | None:
    if "block_depth" not in launch.options:
        return None
    rows, columns, depth = (launch.options[f"block_{side}"] for side in ("rows", "columns", "depth"))
    of_rows, of_weights = launch.arguments[0].element_size(), launch.arguments[_WEIGHT[launch.kernel.__name__]]
    weights = 1 if launch.kernel.__name__ == "down_kernel" else 2
    products = weights + int(launch.options.get("is_split", False))  # rows in fp32 have a low part as well
    read = rows * of_rows + columns * weights * of_weights.element_size()
    return TileWork(bytes=read * depth, operations=2 * products * rows * columns * depth)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(tokens: int) -> Tensor:
    return _empty(tokens, K, dtype=torch.int32)


def _fp32(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float32)


def _experts(precision: str, tile: Tile) -> None:
    dtype = {"16 bit": torch.bfloat16, "fp8": torch.float8_e4m3fn, "32 bit": torch.float32}[precision]
    w13, w2 = _empty(E, 2 * INNER, H, dtype=dtype), _empty(E, H, INNER, dtype=dtype)
    scales = (_fp32(E, 2 * INNER // 128, H // 128), _fp32(E, H // 128, INNER // 128)) if precision == "fp8" else ()
    x = _empty(64, H, dtype=torch.float32 if precision == "32 bit" else torch.bfloat16)
    blocks = _empty(E, dtype=torch.int32)
    slots, used_rows = _empty(E * tile.rows, dtype=torch.int32), _empty(1, dtype=torch.int32)
    expert_outputs(x, Arrangement(slots, blocks, used_rows, _ids(64)), ExpertWeights(w13, w2, *scales), tile)


def _router_product(dtype: torch.dtype) -> None:
    router_product(_empty(64, H, dtype=dtype), _fp32(E + ZERO, H))


CASES: dict[str, Callable[[], object]] = {
    "router product of bf16": lambda: _router_product(torch.bfloat16),
    "router product of fp32": lambda: _router_product(torch.float32),
    "route": lambda: route(
        _fp32(64, E + ZERO), _fp32(E + ZERO), n_routed_experts=E, top_k=K, routed_scaling_factor=6.0
    ),
    "weighted sum": lambda: weighted_sum(_empty(64, K, H), _ids(64), _fp32(64, K), _empty(64, H)),
    "arrange 64 tokens": lambda: arrange(_ids(64), E, 16),
    "arrange 64 tokens, 8 ranks": lambda: arrange(_ids(64), LOCAL, 16, expert_map=_ids(512)),
    "arrange 8192 tokens": lambda: arrange(_ids(8192), E, 128),
    "rows in FP8": lambda: quantize(_empty(64, H)),
    **{
        f"experts in {precision}, blocks of {tile.rows}": partial(_experts, precision, tile)
        for precision, tiles in TILES[DEFAULT].items()
        for _, tile in tiles
    },
}
"""Calls at LongCat-Flash-Chat's sizes. Tensors have no memory."""


def launches() -> dict[str, Launch]:
    """Every launch of every case, by name; rows are quantised in a case of their own."""
    found = {}
    for name, call in CASES.items():
        with recorded() as made:
            call()
        for launch in made:
            kernel = launch.kernel.__name__.removesuffix("_kernel")
            if len(made) == 1 or kernel != "quantize":
                found[f"{name}: {kernel}"] = launch
    return found


def main(results: Path) -> None:
    kernels = {}
    for name, launch in launches().items():
        kernels[name] = {f"sm_{target}": asdict(compiled(launch, target)) for target in ARCHITECTURES}
        print(name, kernels[name], flush=True)
    record = json.loads(results.read_text()) if results.exists() else {}
    record[triton.__version__] = kernels
    results.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else RESULTS)
