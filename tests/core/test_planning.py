"""Hardware as data, occupancy, and the expected time of a grouped product, against figures worked out by hand."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from longcat_core.planning.grouped_product import GroupedProduct, Load, memory_seconds, pass_seconds
from longcat_core.planning.hardware import architecture, gpu, gpus, machine
from longcat_core.planning.occupancy import programs_at_once


def test_a_gpu_is_found_by_its_name_and_as_torch_names_it() -> None:
    assert gpu("NVIDIA H100 80GB HBM3") == gpu("H100")
    assert all(gpu(name).name == name for name in gpus())
    h200 = gpu("H200")
    assert (h200.multiprocessors, h200.bytes_per_second, h200.operations_per_second["fp8"]) == (132, 4.8e12, 1979e12)


def test_a_gpu_that_is_not_known_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"GPU 'H9000': wanted one of H20, H20-141, H800, .*data/machines"):
        gpu("H9000")


@pytest.mark.parametrize(
    ("text", "count", "name"), [("8xH200", 8, "H200"), ("16 x h800", 16, "H800"), ("B200", 1, "B200")]
)
def test_machines_are_a_number_and_a_name(text: str, count: int, name: str) -> None:
    parsed = machine(text)
    assert (parsed.count, parsed.gpu.name) == (count, name)


@pytest.mark.parametrize(
    ("text", "wanted"), [("8xP100", "wanted one of H20,"), ("0xH200", "wanted a number and a name"), ("", "as 8xH200")]
)
def test_other_machines_are_refused_with_what_is_wanted(text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        machine(text)


@pytest.mark.parametrize("name", gpus())
def test_a_gpu_has_plausible_numbers(name: str) -> None:
    found = gpu(name)
    assert 64 << 30 < found.memory_bytes < 400 << 30
    assert found.compute_capability >= (9, 0)
    assert 64 <= found.multiprocessors <= 256


@pytest.mark.parametrize(
    ("warps", "registers", "shared_bytes", "programs"),
    [
        (4, 32, 0, 16),  # 64 warps
        (4, 128, 0, 4),  # 65,536 registers over 128 threads of 128
        (4, 97, 0, 4),  # a warp gets registers in units of 256: 104 a thread
        (4, 96, 0, 5),
        (8, 255, 0, 1),
        (4, 32, 100 * 1024, 2),  # 228 KiB over 101
        (4, 32, 113 * 1024, 2),  # over 114: exactly
        (4, 32, 113 * 1024 + 1, 1),
        (4, 32, 227 * 1024, 1),
        (4, 32, 227 * 1024 + 1, 0),
        (1, 16, 0, 32),  # no more than 32 programs
    ],
)
def test_programs_are_bounded_by_warps_registers_and_shared_memory(
    warps: int, registers: int, shared_bytes: int, programs: int
) -> None:
    assert programs_at_once(architecture("sm_90"), warps, registers, shared_bytes) == programs


@pytest.mark.parametrize("tokens", [0, 1, 5, 8])
def test_blocks_and_touched_experts_are_those_of_all_outcomes(tokens: int) -> None:
    """Every way in which so many tokens may choose one expert or not."""
    probability, block_rows = 0.3, 2
    blocks = touched = 0.0
    for chosen in itertools.product([0, 1], repeat=tokens):
        rows = sum(chosen)
        share = probability**rows * (1 - probability) ** (tokens - rows)
        blocks += 4 * share * math.ceil(rows / block_rows)
        touched += 4 * share * (rows > 0)
    load = Load(tokens, experts=4, probability=probability)
    assert load.blocks(block_rows) == pytest.approx(blocks, abs=1e-12)
    assert load.touched_experts == pytest.approx(touched, abs=1e-12)
    assert load.rows == pytest.approx(4 * tokens * probability)


def test_many_rows_fill_their_blocks_but_for_half_of_one() -> None:
    load = Load(1 << 20, experts=1, probability=1 / 64)
    assert load.blocks(128) == pytest.approx(load.rows / 128 + 0.5, rel=1e-3)


def product(blocks: float, bytes_: float) -> GroupedProduct:
    return GroupedProduct(blocks, block_rows=64, block_columns=128, columns=2048, depth=6144, matrices=2, bytes=bytes_)


def test_a_product_takes_the_longer_of_memory_and_arithmetic() -> None:
    h100 = gpu("H100")
    few, many = product(1, 3.35e12), product(132, 0)
    assert few.memory_seconds(h100) == pytest.approx(1 / 0.9)
    assert few.seconds(h100, "16 bit") == pytest.approx(2e-6 + 1 / 0.9)
    # 16 columns of programs a block: 132 of them on each multiprocessor.
    assert many.programs == 132 * 16
    operations = 132 * 16 * 2 * 2 * 64 * 128 * 6144
    assert many.seconds(h100, "16 bit") == pytest.approx(2e-6 + operations / (989e12 * 0.8))
    assert many.seconds(h100, "fp8") < many.seconds(h100, "16 bit")


def test_programs_that_do_not_fill_the_device_take_as_long_as_those_that_do() -> None:
    h100 = gpu("H100")
    assert product(1, 0).product_seconds(h100, "16 bit") == product(8.25, 0).product_seconds(h100, "16 bit")
    assert product(8.3, 0).product_seconds(h100, "16 bit") == 2 * product(1, 0).product_seconds(h100, "16 bit")


def test_older_instructions_take_longer() -> None:
    h100 = gpu("H100")
    older = replace(product(132, 0), has_older_instructions=True)
    wanted = product(132, 0).product_seconds(h100, "16 bit") / 0.63
    assert older.product_seconds(h100, "16 bit") == pytest.approx(wanted)


def test_a_pass_is_a_launch_and_its_bytes() -> None:
    h100 = gpu("H100")
    assert memory_seconds(h100, 3.35e12) == pytest.approx(1 / 0.9)
    assert pass_seconds(h100, 3.35e12) == pytest.approx(2e-6 + 1 / 0.9)
