"""The planner's data files: every number says how it is known, since when, and by whom, and that reaches a plan."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longcat_core.planning.figures import FIELDS, KINDS, figure_of
from longcat_core.planning.hardware import DATA, MACHINES, gpu, gpus
from longcat_core.planning.models import known, model
from longcat_core.planning.rates import USED, rates, sets

FILES = sorted([*MACHINES.glob("*.json"), *DATA.glob("*.json")])
UNIT = re.compile(r"_(mib|tb_per_s|gb_per_s|tflops|us|gpus|dollars_per_hour)$")
"""The end of a name that has a unit."""
WITHOUT_UNIT = re.compile(
    r"share$|^(multiprocessors|fp8_cache_speedup|operators_a_layer|registers|warps|programs)$|bytes"
)
"""Shares and numbers of things; the bytes of an architecture have theirs in the middle."""


def figures(data: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number of a file with what is said of it."""
    if isinstance(data, dict):
        if "value" in data:
            yield name, data
        else:
            for each, part in data.items():
                yield from figures(part, each)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_number_has_a_kind_a_unit_a_source_and_a_date(file: Path) -> None:
    found = list(figures(json.loads(file.read_text())))
    assert len(found) > 4
    for name, raw in found:
        figure = figure_of(name, raw)
        assert raw.keys() - {"unverified"} == FIELDS
        assert figure.kind in KINDS
        assert figure.source
        assert datetime.date(2024, 1, 1) < figure.date <= datetime.date(2026, 12, 31)
        assert UNIT.search(name) or WITHOUT_UNIT.search(name), f"{name} has no unit in its name"


def test_a_file_has_no_numbers_outside_figures() -> None:
    for file in MACHINES.glob("*.json"):
        raw = json.loads(file.read_text())
        assert raw.keys() == {"name", "device_names", "architecture", "figures"}
        assert raw["name"] == file.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rumoured"}, "kind 'rumoured', wanted one of spec"),
        ({"source": ""}, "no source"),
        ({"value": "80"}, "value '80', wanted a number"),
        ({"remark": "x"}, "remark missing or not known"),
        ({"date": "May"}, "Invalid isoformat"),
    ],
)
def test_a_figure_of_another_form_is_an_error(change: dict[str, Any], message: str) -> None:
    raw = {"value": 1, "unit": "GB", "kind": "spec", "source": "a data sheet", "date": "2026-01-01"}
    assert figure_of("memory_gb", raw).mark == "spec"
    with pytest.raises(ValueError, match=message):
        figure_of("memory_gb", raw | change)


def test_a_month_counts_once_its_day_has_come() -> None:
    figure = gpu("H800").figures["price_dollars_per_hour"]
    assert figure.date == datetime.date(2025, 2, 28)
    assert figure.months(datetime.date(2026, 2, 27)) == 11
    assert figure.months(datetime.date(2026, 2, 28)) == 12


def test_the_machines_of_the_issue_are_there_and_rates_are_dense() -> None:
    assert gpus() == ("H20", "H20-141", "H800", "H100", "H200", "B200", "GB200")
    for name in gpus():
        figures = gpu(name).figures
        assert figures.keys() >= set(USED)
        assert figures["fp8_tflops"].value == pytest.approx(2 * figures["bf16_tflops"].value, rel=0.001)
        assert figures["nvlink_gb_per_s"].value in (200, 450, 900), "one way, not both together"


def test_what_is_not_verified_is_marked() -> None:
    for machine, name in (
        ("H20-141", "memory_tb_per_s"),
        ("H20-141", "memory_mib"),
        ("H800", "memory_mib"),
        ("B200", "attention_tflops"),
    ):
        assert gpu(machine).figures[name].mark.endswith("unverified")
    assert gpu("H20").figures.get("price_dollars_per_hour") is None, "none was found"
    assert gpu("H20-141").figures.get("price_dollars_per_hour") is None


@pytest.mark.parametrize("name", sets())
def test_every_set_of_rates_gives_all_rates(name: str) -> None:
    for machine in gpus():
        found = rates(gpu(machine), name)
        assert found.memory_bytes_per_second <= gpu(machine).bytes_per_second
        assert {figure.name for figure in found.figures} >= {*USED, "layer_overhead_us", "overlap_share"}


def test_other_rates_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="rates: 'fast', wanted one of stock, meituan"):
        rates(gpu("H200"), "fast")
    with pytest.raises(ValueError, match="MODEL: 'gpt', wanted chat, deepseek-v3, lite"):
        model("gpt")
    assert known() == ("chat", "deepseek-v3", "lite", "longcat-2.0", "qwen3-235b")


def test_all_to_all_is_slower_to_start_over_more_nodes() -> None:
    found = rates(gpu("H200"))
    assert found.all_to_all_seconds("dispatch", 8) < found.all_to_all_seconds("dispatch", 16)
    assert found.all_to_all_seconds("combine", 128) == found.all_to_all_seconds("combine", 64), "the last known"
    assert found.all_to_all_seconds("dispatch", 1) == 0
    assert found.sum_seconds(8) < found.sum_seconds(16)
