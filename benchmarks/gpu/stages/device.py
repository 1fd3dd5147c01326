"""Which device this is, and what memory, tensor cores and a launch reach: what the floors are made of."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Context, Row, rows

PACKAGES = ("torch", "triton", "vllm", "transformers", "longcat-serving")
_QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def stage(context: Context) -> Iterator[Row]:
    yield from rows(_cases(context), context)


def _cases(context: Context) -> Iterator[Case]:
    yield Case({"what": "identity"}, lambda: identity(context))
    yield Case({"what": "launch"}, lambda: _launch(context))
    yield Case({"what": "copy"}, lambda: _copy(context))
    yield Case({"what": "product", "precision": "16 bit"}, lambda: _product(context))
    yield Case({"what": "product", "precision": "fp8"}, lambda: _product_in_fp8(context))


def identity(context: Context) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {"device": context.device_name, "system": _nvidia_smi(), "versions": versions}


def _nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(_QUERY.split(","), map(str.strip, found.split(",")), strict=False))


def _launch(context: Context) -> dict[str, Any]:
    """A kernel that does next to nothing, in a graph."""
    one = torch.zeros(1, device=context.device)
    return asdict(context.timer(lambda: one.add_(1)))


def _copy(context: Context) -> dict[str, Any]:
    source = torch.zeros(context.sizes.copied_bytes // 4, device=context.device)
    target = torch.empty_like(source)
    timing = context.timer(lambda: target.copy_(source))
    return {**asdict(timing), "bytes_per_second": 2 * context.sizes.copied_bytes / timing.us * 1e6}


def _product(context: Context) -> dict[str, Any]:
    size = context.sizes.product_size
    a, b = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    timing = context.timer(lambda: a @ b)
    return {**asdict(timing), "operations_per_second": 2 * size**3 / timing.us * 1e6}


def _product_in_fp8(context: Context) -> dict[str, Any]:
    size = context.sizes.product_size
    a, b = (torch.randn(size, size, device=context.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=context.device)
    timing = context.timer(lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    return {**asdict(timing), "operations_per_second": 2 * size**3 / timing.us * 1e6}
