"""Compile FlashInfer's MLA for Hopper at LongCat's sizes, and read what the machine code needs. No GPU is asked for.

    make cuda-check KERNELS=all

installs NVIDIA's compiler into .venv-cuda and runs this there, in some minutes. It is what FlashInfer does at the first
start with `flashinfer_mla`, and shows that its kernels exist for these sizes, with whole queries in registers.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LATENT, ROPE = 512, 64


@dataclass(frozen=True)
class Compiled:
    kernel: str
    registers: int
    stack_bytes: int
    local_bytes: int
    """Spilled registers."""


def prepare(toolkit: Path, directory: Path) -> None:
    """Have FlashInfer compile with the toolkit of Python packages, into a directory. Before it is imported."""
    libraries = directory / "lib"
    libraries.mkdir()
    (libraries / "libcudart.so").symlink_to(toolkit / "lib" / "libcudart.so.13")
    empty = directory / "libcuda.c"
    empty.touch()
    subprocess.run(["gcc", "-shared", "-o", libraries / "libcuda.so", empty], check=True)
    os.environ.update(
        CUDA_HOME=str(toolkit),
        FLASHINFER_CUDA_ARCH_LIST="9.0a",
        FLASHINFER_WORKSPACE_BASE=str(directory),
        MAX_JOBS="1",
        LIBRARY_PATH=str(libraries),
        PATH=f"{toolkit / 'bin'}:{os.environ['PATH']}",
    )


def compile_mla(cache: str) -> Path:
    """cache: "bfloat16" or "float8_e4m3fn", the dtype of the cache. Returns the library."""
    import torch
    from flashinfer.jit.attention.modules import gen_batch_mla_module

    query, dtype = torch.bfloat16, getattr(torch, cache)
    spec: Any = gen_batch_mla_module("fa3", query, dtype, query, torch.int32, LATENT, ROPE, False)
    spec.build(verbose=False)
    return Path(spec.jit_library_path)


def needs_of(library: Path) -> list[Compiled]:
    """As cuobjdump, which is Triton's, lists them."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([cuobjdump, "-res-usage", library], check=True, capture_output=True, text=True)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listed.stdout + listed.stderr)
    return [Compiled(name, int(registers), int(stack), int(local)) for name, registers, stack, local in found]


def main() -> None:
    import nvidia

    (packages,) = nvidia.__path__
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(packages) / "cu13", Path(name))
        for cache in ("bfloat16", "float8_e4m3fn"):
            start = time.monotonic()
            kernels = needs_of(compile_mla(cache))
            print(f"cache in {cache}: {time.monotonic() - start:.0f} s", *kernels, sep="\n  ", flush=True)
            spills = [kernel for kernel in kernels if kernel.stack_bytes or kernel.local_bytes]
            if not kernels or spills:
                sys.exit(
                    f"{cache}: {len(kernels)} kernels, wanted some; registers are spilled in {spills}, wanted none"
                )


if __name__ == "__main__":
    main()
