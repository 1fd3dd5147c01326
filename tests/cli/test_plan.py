"""`longcat plan`: what it prints and writes, when it ends with which status, and that it starts nothing."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from longcat_cli.commands import app
from longcat_core import spellings
from longcat_core.planning import calibration, dry_run, launch
from longcat_core.planning.dry_run import Memory, Operation, Report, Request, Step
from longcat_core.planning.hardware import gpu
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment, GoalError, for_dollars, for_users, notes
from longcat_core.planning.rates import rates
from longcat_core.planning.search import deployments, frontier, points
from tests.cases import DEFAULT


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


def as_json(*words: str) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


FP8 = ("chat", "--gpus", "8xH200", "--precision", "fp8")


def test_a_plan_says_memory_stages_rates_price_commands_and_assumptions() -> None:
    result = run(*FP8, "--drafts", "1", "--acceptance", "0.8", "--goal-tokens-per-user", "20")
    assert result.exit_code == 0
    for part in (
        "LongCat-Flash-Chat on 8 x H200, TP8 EP8, overlap: none; rates: stock",
        "560.7 B parameters, 27.1 B a token",
        "room for the cache",
        "65,664 bytes a token on each GPU; a replica (8 GPUs) holds",
        "attention 1 core",
        "launches and gaps",
        "tokens/s a GPU",
        "dollars a million tokens",
        "bottleneck",
        "bound by memory",
        "vLLM: vllm serve meituan-longcat/LongCat-Flash-Chat-FP8 --tensor-parallel-size 8 --enable-expert-parallel",
        "SGLang: python -m sglang.launch_server --model-path meituan-longcat/LongCat-Flash-Chat-FP8 --tp-size 8",
        "given with --acceptance",
        "SGLang issue 30247",
        "computed: no LongCat model has been measured",
    ):
        assert part in result.output, part


def test_what_does_not_fit_is_told_with_the_missing_gigabytes() -> None:
    result = run("chat", "--gpus", "8xH200")
    assert result.exit_code == 1
    assert "does not fit: 10.5 GB a GPU are missing for 1 request of 4096 tokens" in result.output
    assert "vllm serve" not in result.output
    found = json.loads(run("chat", "--gpus", "8xH100", "--precision", "fp8", "--json").stdout)
    assert found["fits"] is False
    assert found["missing_bytes"] == pytest.approx(1.6e9, abs=0.3e9)
    too_many = run(*FP8, "--batch", "100000")
    assert too_many.exit_code == 1


def test_json_has_what_the_tables_have() -> None:
    found = as_json(*FP8, "--batch", "16")
    assert found["requests_a_replica"] == 16
    assert found["layout"] == {"tp": 8, "dp": 1, "ep": 8}
    assert [stage["name"] for stage in found["stages"]] == ["attention", "MoE", "second half"]
    layer = sum(stage["seconds"] for stage in found["stages"]) + found["layer_overhead_seconds"]
    assert found["layer_seconds"] == pytest.approx(layer)
    assert found["tokens_per_second_a_gpu"] == pytest.approx(16 / found["step_seconds"] / 8)
    price = 3.5 / 3600 / found["tokens_per_second_a_gpu"] * 1e6
    assert found["dollars_a_million_tokens"] == pytest.approx(price)
    assert sum(each["share"] for each in found["bottlenecks"]) == pytest.approx(1)
    assert {each["kind"] for each in found["assumptions"]} == {"spec", "measured", "computed", "assumed"}


def test_unverified_numbers_are_marked_in_the_output() -> None:
    words = ("chat", "--gpus", "8xH20-141", "--precision", "fp8", "--batch", "1")
    printed = run(*words).output
    assert "unverified, so take what rests on it with care: memory_mib, memory_tb_per_s" in printed
    assert "assumed, unverified" in printed
    assert "no price: none was found for 8 x H20-141" in printed
    found = as_json(*words)
    assert found["dollars_a_million_tokens"] is None
    marked = {each["name"] for each in found["assumptions"] if each["is_unverified"]}
    assert {"memory_tb_per_s", "memory_mib"} <= marked
    assert as_json(*words, "--price", "1")["dollars_a_million_tokens"] > 0


def test_what_is_known_of_a_model_is_said() -> None:
    assert "left to the engines' own classes" in run("lite", "--gpus", "H200").output
    assert "sparse attention and indexer are not modelled" in run("longcat-2.0", "--gpus", "32xB200").output


def test_only_what_plays_a_part_is_listed() -> None:
    one, node, nodes = (
        {each["name"] for each in as_json("lite", "--gpus", gpus, "--batch", "1")["assumptions"]}
        for gpus in ("B200", "8xB200", "16xB200")
    )
    assert one < node < nodes
    assert "nvlink_gb_per_s" in node - one
    assert "all_to_all_gb_per_s" in nodes - node


def test_a_price_of_more_than_twelve_months_is_noted() -> None:
    known = gpu("H800")
    speed = rates(known)
    price = known.figures["price_dollars_per_hour"]
    old = Deployment(model("chat"), "H800", speed, Layout(1, 128, 128), precision("fp8"), 5000, dollars_an_hour=price)
    assert not any("months old" in note for note in notes(old, datetime.date(2026, 2, 28)))
    assert "the price is 13 months old, of 2025-02-28" in list(notes(old, datetime.date(2026, 3, 28)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "wanted a MODEL and --gpus, or --preset, or --calibrate"),
        (("chat", "--gpus", "8xP100"), "GPU 'P100': wanted one of H20"),
        (("gpt", "--gpus", "8xH200"), "MODEL: 'gpt', wanted chat"),
        ((*FP8, "--drafts", "1"), "how many are accepted? --acceptance"),
        ((*FP8, "--tp", "4", "--dp", "4"), "tp 4 x dp 4 = 16, wanted the 8 GPUs"),
        ((*FP8, "--ep", "4"), "ep: 4, wanted 1 or tp x dp = 8"),
        ((*FP8, "--dp", "8", "--ep", "1"), "ep: 1 beside dp is not modelled"),
        ((*FP8, "--batch", "1", "--goal-dollars", "1"), "one of them"),
        ((*FP8, "--rates", "fast"), "rates: 'fast', wanted one of stock"),
        ((*FP8, "--eplb"), "wanted --routing FILE"),
        (("qwen3-235b", "--gpus", "8xH200", "--overlap", "single-batch"), "needs a shortcut"),
        (("deepseek-v3", "--gpus", "8xH200", "--drafts", "1", "--acceptance", "1"), "planned without an MTP layer"),
        (("--preset", "report-table-6", "--context", "5000"), "the rows of report-table-6 have their own"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_is_wanted(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_goal_out_of_reach_ends_with_how_far_it_goes() -> None:
    fast = run(*FP8, "--goal-tokens-per-user", "5000")
    assert fast.exit_code == 1
    assert "out of reach: 5000 tokens/s a user: one request alone has" in fast.output
    cheap = run(*FP8, "--goal-dollars", "0.01")
    assert cheap.exit_code == 1
    assert "requests that fit in a replica it is" in cheap.output


def chat(**changes: Any) -> Deployment:
    known = gpu("H200")
    price = known.figures["price_dollars_per_hour"]
    found = Deployment(
        model("chat"), "8 x H200", rates(known), Layout(8, 1, 8), precision("fp8"), 4096, dollars_an_hour=price
    )
    return replace(found, **changes)


def test_the_most_requests_for_a_speed_are_that_fast_and_one_more_is_not() -> None:
    deployment = chat(context=1024)
    choice = for_users(deployment, 60)
    assert choice.bound == "time"
    assert choice.plan.tokens_per_second_a_user >= 60
    assert deployment.at(choice.plan.requests + 1).tokens_per_second_a_user < 60


def test_the_fewest_requests_for_a_price_are_that_cheap_and_one_less_is_not() -> None:
    choice = for_dollars(chat(), 2.0)
    assert choice.plan.dollars_a_million_tokens is not None
    assert choice.plan.dollars_a_million_tokens <= 2.0
    fewer = chat().at(choice.plan.requests - 1).dollars_a_million_tokens
    assert fewer is not None
    assert fewer > 2.0
    with pytest.raises(GoalError, match="no price is known"):
        for_dollars(chat(dollars_an_hour=None), 2.0)


def test_find_tries_every_layout_and_shows_the_best() -> None:
    found = as_json(*FP8, "--find")
    layouts = [each["layout"]["tp"] for each in found["layouts"]]
    assert sorted(layouts) == [1, 2, 4, 8]
    rates_ = [each["tokens_per_second_a_gpu"] for each in found["layouts"]]
    assert rates_ == sorted(rates_, reverse=True)
    assert found["tokens_per_second_a_gpu"] == rates_[0]
    assert found["layout"] == found["layouts"][0]["layout"]


def test_find_leaves_out_layouts_that_do_not_hold_a_batch() -> None:
    found = as_json(*FP8, "--find", "--batch", "128")
    assert [each["layout"]["dp"] for each in found["layouts"]] == [4, 2, 1]


def test_find_for_a_price_shows_the_fastest_for_a_user() -> None:
    found = as_json(*FP8, "--find", "--goal-dollars", "2")
    speeds = [each["tokens_per_second_a_user"] for each in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    assert all(each["dollars_a_million_tokens"] <= 2 for each in found["layouts"])


def test_nothing_is_above_and_right_of_the_frontier() -> None:
    plans = points(deployments(chat()))
    best = frontier(plans)
    assert 3 < len(best) < len(plans)
    for plan in plans:
        assert not any(
            plan.tokens_per_second_a_gpu > each.tokens_per_second_a_gpu
            and plan.tokens_per_second_a_user > each.tokens_per_second_a_user
            for each in best
        )


def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "frontier.png"
    assert run(*FP8, "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_command_lines_name_what_a_stock_engine_takes() -> None:
    lines = launch.commands(replace(chat(), layout=Layout(1, 8, 8)), 12.5)
    assert "--data-parallel-size 8" in lines["vLLM"]
    assert "--max-num-seqs 13" in lines["vLLM"]
    assert "--tp-size 8 --dp-size 8 --enable-dp-attention --ep-size 8" in lines["SGLang"]
    assert "--max-running-requests 100" in lines["SGLang"]
    assert any("no overlap within a batch" in each for each in launch.remarks(chat(overlap="single-batch")))
    two_nodes = launch.commands(replace(chat(), layout=Layout(8, 2, 16)), 1)
    assert all("--nnodes 2" in line for line in two_nodes.values())


def test_the_presets_print_every_assumption() -> None:
    seven = run("--preset", "report-table-7").output
    assert seven.count("- stated: ") == 4
    assert seven.count("- inferred: ") == 10
    six = run("--preset", "report-table-6").output
    assert "meituan-serial" in six
    assert "cannot tell overlap from none" in six
    found = json.loads(run("--preset", "report-table-7", "--json").stdout)
    assert len(found["rates"]["report"]) == 3


def test_a_config_alone_is_planned(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(spellings.published(DEFAULT)))
    found = as_json(str(file), "--gpus", "H200", "--batch", "8", "--context", "100")
    assert found["layout"] == {"tp": 1, "dp": 1, "ep": 1}


def test_recorded_routing_slows_the_experts_and_balance_helps(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps([[100] * 8 + [1] * 504]))
    words = ("chat", "--gpus", "64xH200", "--dp", "64", "--precision", "fp8", "--batch", "64")
    even = as_json(*words)["step_seconds"]
    uneven = as_json(*words, "--routing", str(file))["step_seconds"]
    balanced = as_json(*words, "--routing", str(file), "--eplb")["step_seconds"]
    assert even < balanced < uneven


def test_fewer_ffn_experts_cost_less() -> None:
    times = [as_json(*FP8, "--batch", "8", "--ffn-experts", k)["step_seconds"] for k in ("0", "8", "12")]
    assert times == sorted(times)
    assert times[0] < times[2]


def test_a_dry_run_gives_memory_and_launches(tmp_path: Path) -> None:
    file = tmp_path / "dry.json"
    step = Step("decode", 16, 16, (Operation("product", "gemm", 60, (30, 30)),))
    memory = Memory(150 * 10**9, 120 * 10**9, 70 * 10**9, 5 * 10**9, 45 * 10**9, 64512, 0)
    dry_run.write([Report(Request("chat"), "vLLM", "8 x H200", memory=memory, steps=(step,))], file)
    found = as_json(*FP8, "--batch", "1", "--dry-run", str(file))
    assert found["memory_of_a_gpu"]["weights_bytes"] == 70e9
    assert found["memory_of_a_gpu"]["kept_bytes"] == 5e9
    assert found["memory_of_a_gpu"]["share"] == 0.8
    assert found["layer_overhead_seconds"] == pytest.approx(30 * 237e-6 / 48)
    assert "weights, activations and launches of a layer are a dry run's" in found["notes"]
    dry_run.write([Report(Request("chat"), "vLLM", "8 x H200", refused="no")], file)
    assert "it has no memory or no step of decode" in run(*FP8, "--dry-run", str(file)).output


def test_a_calibrated_cpu_is_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = calibration.Sizes(bytes_read=1 << 16, weights=(2, 16, 32), rows=(1, 4), operators=5, passes=2)
    measured = calibration.calibrate(tiny, lambda: (0.0,))
    monkeypatch.setattr(calibration, "calibrate", lambda: measured)
    file = tmp_path / "cpu.json"
    result = run("--calibrate", str(file))
    assert result.exit_code == 0
    config = tmp_path / "config.json"
    config.write_text(json.dumps(spellings.published(DEFAULT)))
    words = (str(config), "--gpus", str(file), "--batch", "1", "--context", "64")
    found = as_json(*words)
    assert found["rates"] == "calibrated"
    layers = found["layers"] * found["layer_seconds"]
    assert layers + found["engine_seconds"] < found["step_seconds"]
    assert found["step_seconds"] == pytest.approx(1 / found["tokens_per_second_a_user"])
    engine = next(each for each in found["bottlenecks"] if each["operation"] == "engine, outside of the layers")
    assert engine["share"] == pytest.approx(found["engine_seconds"] / found["step_seconds"])
    assert f", engine {found['engine_seconds'] * 1e3:.2f} ms, output head" in run(*words).output


def test_a_busy_machine_is_not_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> None:
        raise calibration.CalibrationError("load average 3.00, wanted at most 0.5")

    monkeypatch.setattr(calibration, "calibrate", busy)
    result = run("--calibrate", str(tmp_path / "cpu.json"))
    assert result.exit_code == 2
    assert "wanted at most 0.5" in result.output


def test_a_plan_imports_no_torch_and_no_engine() -> None:
    script = (
        "import sys; from longcat_cli import plan, plan_report; from longcat_core.planning import plan as p; "
        "print({'torch', 'vllm', 'sglang', 'transformers'} & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
