"""The report of a measurement, on a record whose times are made up."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.goals import goals
from benchmarks.gpu.measured import Measured
from benchmarks.gpu.tuned import best_tiles, fragment
from longcat_core.kernels.tiles import DEFAULT, TILES, Tile

TOKENS = (1, 96, 512)
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 3e12, 800e12


def timing(us: float, **more: object) -> dict[str, Any]:
    return {"us": us, "us_low": us, "us_high": us, "calls": 1, "repetitions": 9, **more}


def moe_row(kernel: str, tokens: int, us: float, precision: str = "16 bit") -> dict[str, Any]:
    case = {
        "precision": precision,
        "deployment": "tensor",
        "local_experts": 64,
        "routing": "random",
        "tokens": tokens,
        "kernel": kernel,
    }
    return {"case": case, "result": timing(us, bytes=240e6, operations=8e9)}  # a floor of 80 us


def record(**of_ours: float) -> dict[str, Any]:
    """Ours takes 100 us, vLLM's 110 with slots dropped and 150 with all computed, but for `of_ours`, by kernel."""
    times = {"ours": 100.0, "vLLM, dropped": 110.0, "vLLM, remapped": 150.0} | of_ours
    device = [
        {"case": {"what": "identity"}, "result": {"versions": {"torch": "2.11"}, "system": {"driver_version": "580"}}},
        {"case": {"what": "copy"}, "result": timing(700, bytes_per_second=BYTES_PER_SECOND)},
        *(
            {
                "case": {"what": "product", "precision": precision},
                "result": timing(9, operations_per_second=OPERATIONS_PER_SECOND),
            }
            for precision in ("16 bit", "fp8")
        ),
    ]
    stages = {
        "device": device,
        "parity": [
            {"case": {"test": "tests/a.py::test_a"}, "result": {"outcome": "passed", "seconds": 1.0}},
            {"case": {"test": "tests/a.py::test_b"}, "result": {"outcome": "failed", "seconds": 1.0, "message": "E 1"}},
        ],
        "pieces": [
            {"case": {"piece": "route", "tokens": 96, "kernel": "ours"}, "result": timing(5.5)},
            {"case": {"piece": "route", "tokens": 96, "kernel": "torch"}, "result": timing(48.0)},
        ],
        "moe": [moe_row(kernel, tokens, us) for tokens in TOKENS for kernel, us in times.items()],
        "rank": [
            {
                "case": {"ranks": 128, "batch": 96, "context": 5120, "part": "MoE", "kernel": "ours"},
                "result": timing(90.0),
            }
        ],
    }
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "kernels": "def",
        "is_tiny": False,
        "device": "NVIDIA X",
        "stages": {name: {"state": "complete", "seconds": 1.0, "rows": rows} for name, rows in stages.items()},
    }


def verdicts(made: dict[str, Any]) -> list[str]:
    return [goal.verdict for goal in goals(Measured(made))]


def test_goals_are_met_where_every_shape_reaches_them() -> None:
    assert verdicts(record()) == ["met"] * 5


@pytest.mark.parametrize(
    ("kernel", "us", "missed"),
    [
        ("vLLM, remapped", 139.0, {0}),
        ("vLLM, remapped", 114.0, {0, 1}),
        ("vLLM, dropped", 99.0, {2}),
        ("ours", 100.1, {3}),
    ],
)
def test_a_goal_that_one_shape_misses_is_missed(kernel: str, us: float, missed: set[int]) -> None:
    found = verdicts(record(**{kernel: us}))
    assert {i for i, verdict in enumerate(found) if verdict == "missed"} == missed


def test_a_goal_of_what_was_not_measured_is_neither_met_nor_missed() -> None:
    made = record()
    made["stages"]["moe"]["rows"] = [
        row if row["case"]["kernel"] == "ours" else {"case": row["case"], "missing": "vLLM"}
        for row in made["stages"]["moe"]["rows"]
    ]
    assert verdicts(made) == ["not measured"] * 3 + ["met", "met"]


def test_the_worst_shape_is_named() -> None:
    made = record()
    made["stages"]["moe"]["rows"].append(moe_row("ours", 8192, 100.0))
    made["stages"]["moe"]["rows"].append(moe_row("vLLM, remapped", 8192, 120.0))
    goal = goals(Measured(made))[0]
    assert goal.verdict == "missed"
    assert goal.found.startswith("1.20 (16 bit, 64 local experts, every rank sees the batch, random routing, 8192 tok")
    assert goal.found.endswith("1 of 2 shapes reach it")


def test_the_floor_is_of_the_rates_that_were_measured() -> None:
    (setting,) = Measured(record()).moe_settings()
    assert setting.floor_us(96) == pytest.approx(240e6 / BYTES_PER_SECOND * 1e6)
    made = record()
    for row in made["stages"]["moe"]["rows"]:
        row["result"]["operations"] = 160e9
    (setting,) = Measured(made).moe_settings()
    assert setting.floor_us(96) == pytest.approx(160e9 / OPERATIONS_PER_SECOND * 1e6)


def test_without_measured_rates_the_floor_is_the_data_sheets_or_there_is_none() -> None:
    made = record()
    made["stages"]["device"]["rows"] = []
    assert Measured(made).moe_settings()[0].floor_us(96) is None
    made["device"] = "NVIDIA H200"
    assert Measured(made).moe_settings()[0].floor_us(96) == pytest.approx(240e6 / 4.8e12 * 1e6)


def test_the_page_has_what_was_measured_and_what_went_wrong() -> None:
    made = record()
    rows = made["stages"]["moe"]["rows"]
    rows[1] = {"case": rows[1]["case"], "wrong": "worst token's error 3e-1: wanted at most 0.02"}
    rows[2] = {"case": rows[2]["case"], "error": "Traceback ...\nRuntimeError: out of something"}
    made["stages"]["rank"]["state"] = "cut off"
    page = report.text(Measured(made))
    assert "| 1 | 100.0 | wrong | error |  |  | 80.0 | 80% |" in page
    assert "| 96 | 100.0 | 110.0 | 150.0 | 1.50 | 1.10 | 80.0 | 80% |" in page
    assert "vLLM, dropped: worst token's error 3e-1: wanted at most 0.02" in page
    assert "vLLM, remapped: RuntimeError: out of something" in page
    assert "| rank | cut off |" in page
    assert "- parity: 1 failed, 1 passed" in page
    assert "  - tests/a.py::test_b: E 1" in page
    assert "| copy | 700.0 | 3.00 TB/s |" in page
    assert "| MoE | ours | 90.0 | 60 | 1.50 |" in page
    assert "| route | ours | 5.5 |" in page


def test_a_spread_is_shown_where_it_is_wide() -> None:
    row = {"result": {"us": 10.0, "us_low": 9.9, "us_high": 10.3}}
    assert report._us(row) == "10.0"
    row["result"]["us_high"] = 10.5
    assert report._us(row) == "10.0 (9.9 to 10.5)"


def tile_row(precision: str, tokens: int, slots: int, tile: Tile, us: float) -> dict[str, Any]:
    case = {"precision": precision, "tokens": tokens, "slots_per_expert": slots, "tile": asdict(tile)}
    return {"case": case, "result": timing(us)}


def test_the_fastest_tiles_are_an_entry_of_the_table() -> None:
    small, large = Tile(16, 64, 128, 4, 5, is_swapped=True), Tile(64, 256, 64, 8, 3, is_swapped=False)
    default = TILES[DEFAULT]["16 bit"][0][1]
    made = record()
    rows = [
        tile_row("16 bit", 96, 3, small, 10.0),
        tile_row("16 bit", 96, 3, default, 12.0),
        tile_row("16 bit", 192, 5, small, 11.0),
        tile_row("16 bit", 2048, 48, large, 30.0),
        tile_row("16 bit", 2048, 48, small, 31.0),
    ]
    rows.append({"case": tile_row("16 bit", 96, 3, large, 0)["case"], "wrong": "worst token's error 1e9"})
    made["stages"]["tiles"] = {"state": "complete", "seconds": 1.0, "rows": rows}
    best = best_tiles(Measured(made))
    assert [(found.slots, Tile(**found.tile), found.us) for found in best] == [
        (3, small, 10.0),
        (5, small, 11.0),
        (48, large, 30.0),
    ]
    assert [found.default_us for found in best] == [12.0, None, None]
    entry = eval("{" + fragment("NVIDIA X", best) + "}", {"Tile": Tile})["NVIDIA X"]
    assert entry["16 bit"] == ((5, small), (1 << 30, large))
    assert {precision: entry[precision] for precision in ("fp8", "32 bit")} == {
        precision: TILES[DEFAULT][precision] for precision in ("fp8", "32 bit")
    }
    assert fragment("NVIDIA X", best) in report.text(Measured(made))


def test_the_files_are_written_beside_the_record(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(record()))
    report.main([str(file)])
    assert "![The MoE layer](x.png)" in (tmp_path / "x.md").read_text()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    made = record()
    made["stages"] = {}
    file.write_text(json.dumps(made))
    (tmp_path / "x.png").unlink()
    report.main([str(file)])
    assert "![" not in (tmp_path / "x.md").read_text()
    assert not (tmp_path / "x.png").exists()
