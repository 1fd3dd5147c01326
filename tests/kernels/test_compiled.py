"""The kernels as machine code for Hopper and Blackwell: what they need is on record, and must not become more."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/gpu/compiled.json").read_text())
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory of a program on sm_90 and sm_100."""

Code = dict[str, Any]
CASES = [(name, target) for name, targets in RECORD["kernels"].items() for target in targets]


def worse(code: Code, record: Code) -> list[str]:
    """What machine code needs more of than the one on record, or has less of."""
    found = [
        f"{name}: {code[name]}, on record {record[name]}"
        for name in ("registers", "spilled_bytes", "shared_bytes")
        if code[name] > record[name]
    ]
    if code["tensor_core"].keys() != record["tensor_core"].keys():
        found.append(f"tensor core: {code['tensor_core']}, on record {record['tensor_core']}")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Code]]:
    """Compiled now, in a process of its own: about a minute of CPU time, or a few seconds from Triton's cache."""
    if importlib.metadata.version("triton") != RECORD["triton"]:
        pytest.skip(f"the record is of Triton {RECORD['triton']}, and another compiler makes other code")
    results = tmp_path_factory.mktemp("compiled") / "compiled.json"
    command = [sys.executable, "-m", "benchmarks.gpu.compile_kernels", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(results.read_text())["kernels"]


def test_every_kernel_is_on_record(compiled: dict[str, dict[str, Code]]) -> None:
    assert [(name, target) for name, targets in compiled.items() for target in targets] == CASES


@pytest.mark.parametrize(("name", "target"), CASES)
def test_machine_code_needs_no_more_than_is_on_record(
    name: str, target: str, compiled: dict[str, dict[str, Code]]
) -> None:
    assert worse(compiled[name][target], RECORD["kernels"][name][target]) == []


@pytest.mark.parametrize(("name", "target"), CASES)
def test_nothing_is_spilled_and_shared_memory_is_enough(name: str, target: str) -> None:
    code = RECORD["kernels"][name][target]
    assert code["spilled_bytes"] == 0
    assert code["shared_bytes"] <= SHARED_LIMIT


@pytest.mark.parametrize(("name", "target"), CASES)
def test_products_are_on_the_tensor_cores_of_the_device(name: str, target: str) -> None:
    """By its own instructions, not by those of older devices; products in 32 bit are exact, and on none."""
    expected = set()
    if name.endswith(("gate_up", "down", "router_product")) and "32 bit" not in name:
        of_fp8, of_16_bit = {"sm_90": ("QGMMA", "HGMMA"), "sm_100": ("UTCQMMA", "UTCHMMA")}[target]
        expected = {of_fp8 if "fp8" in name else of_16_bit}
    assert RECORD["kernels"][name][target]["tensor_core"].keys() == expected


def test_a_change_for_the_worse_is_seen() -> None:
    record = {"registers": 100, "spilled_bytes": 0, "shared_bytes": 1024, "tensor_core": {"HGMMA": 8}}
    assert worse(record, record) == []
    assert worse({**record, "registers": 90, "tensor_core": {"HGMMA": 4}}, record) == []
    assert worse({**record, "registers": 101}, record) == ["registers: 101, on record 100"]
    assert worse({**record, "spilled_bytes": 8}, record) == ["spilled_bytes: 8, on record 0"]
    assert worse({**record, "shared_bytes": 2048}, record) == ["shared_bytes: 2048, on record 1024"]
    assert worse({**record, "tensor_core": {"HMMA": 8}}, record) == ["tensor core: {'HMMA': 8}, on record {'HGMMA': 8}"]
