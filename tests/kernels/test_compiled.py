"""The kernels as machine code for Hopper and Blackwell: what they need is on record, and must not become more.

Two versions of Triton are on record, those of the two engines' environments; the installed one compiles again.
"""
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
RECORDS = json.loads((ROOT / "benchmarks/gpu/compiled.json").read_text())
VERSION = importlib.metadata.version("triton")
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory of a program on sm_90 and sm_100."""

Code = dict[str, Any]
Record = dict[str, dict[str, Code]]
"""By kernel, then by architecture."""
NAMES, TARGETS = sorted({name for record in RECORDS.values() for name in record}), ["sm_100", "sm_90"]


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
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Compiled now, in a process of its own: about a minute of CPU time, or half of it from Triton's cache."""
    if VERSION not in RECORDS:
        pytest.skip(f"Triton {VERSION} makes other code than {' and '.join(RECORDS)}, which are on record")
    results = tmp_path_factory.mktemp("compiled") / "compiled.json"
    command = [sys.executable, "-m", "benchmarks.gpu.compile_kernels", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: Record = json.loads(results.read_text())[VERSION]
    return found


def test_every_kernel_is_on_record(compiled: Record) -> None:
    for record in (compiled, *RECORDS.values()):
        assert sorted(record) == NAMES
        assert all(sorted(code) == TARGETS for code in record.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_machine_code_needs_no_more_than_is_on_record(name: str, target: str, compiled: Record) -> None:
    assert worse(compiled[name][target], RECORDS[VERSION][name][target]) == []


@pytest.mark.parametrize("version", RECORDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_spilled_and_the_tensor_cores_are_used(name: str, target: str, version: str) -> None:
    """By the device's own instructions, not by those of older ones; products in 32 bit are exact, and on none."""
    code = RECORDS[version][name][target]
    expected = set()
    if name.endswith(("gate_up", "down", "router_product")) and "32 bit" not in name:
        of_fp8, of_16_bit = {"sm_90": ("QGMMA", "HGMMA"), "sm_100": ("UTCQMMA", "UTCHMMA")}[target]
        expected = {of_fp8 if "fp8" in name else of_16_bit}
    assert code["spilled_bytes"] == 0
    assert code["shared_bytes"] <= SHARED_LIMIT
    assert code["tensor_core"].keys() == expected


def test_a_change_for_the_worse_is_seen() -> None:
    record = {"registers": 100, "spilled_bytes": 0, "shared_bytes": 1024, "tensor_core": {"HGMMA": 8}}
    assert worse(record, record) == []
    assert worse({**record, "registers": 90, "tensor_core": {"HGMMA": 4}}, record) == []
    assert worse({**record, "registers": 101}, record) == ["registers: 101, on record 100"]
    assert worse({**record, "spilled_bytes": 8}, record) == ["spilled_bytes: 8, on record 0"]
    assert worse({**record, "shared_bytes": 2048}, record) == ["shared_bytes: 2048, on record 1024"]
    assert worse({**record, "tensor_core": {"HMMA": 8}}, record) == ["tensor core: {'HMMA': 8}, on record {'HGMMA': 8}"]
