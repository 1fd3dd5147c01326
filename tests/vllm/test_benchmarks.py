"""vLLM's own benchmarks measure our model, with drafts and without, as docs/benchmarks.md says."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_cli.make_checkpoint import make_checkpoint
from tests.cases import DEFAULT
from tests.server import Server, serving
from tests.vllm.engine import GATED_FLAGS, METRICS, speculation_flags, stock_command

NANO = Path(__file__).parents[2] / "longcat_nano" / "checkpoint"
VLLM = Path(sys.executable).with_name("vllm")
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "60000000"]
SIZES = ["--input-len", "8", "--output-len", "4"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two processes take its requests; its drafts go through Nano's gate."""
    flags = ["--served-model-name", "nano", "--api-server-count", "2", *speculation_flags(2), *GATED_FLAGS]
    with serving([*stock_command(NANO), *SMALL, *flags], tmp_path_factory.mktemp("server") / "server.log") as running:
        yield running


def measured(benchmark: str, *arguments: str | Path) -> str:
    """What a benchmark prints, when it has ended well."""
    done = subprocess.run([VLLM, "bench", benchmark, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def test_bench_serve_measures_a_server_that_drafts(server: Server) -> None:
    words = ["--base-url", str(server.http.base_url).rstrip("/"), "--model", "nano", "--tokenizer", NANO]
    sizes = ["--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "8", "--num-prompts", "2"]
    printed = measured("serve", *words, *sizes)
    assert "Successful requests:                     2" in printed


def test_what_guards_a_request_holds_in_every_process_that_takes_one(server: Server) -> None:
    request = {"model": "nano", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    for _ in range(4):  # whichever of the two takes it
        refused = server.http.post("/v1/completions", json=request | {"prompt": [5, 2048]})
        assert refused.status_code == 400, refused.text
        assert "out of vocabulary" in refused.text
        server.http.post("/v1/completions", json=request | {"prompt": [5, 6]}).raise_for_status()
        assert server.metric(METRICS.pruned) >= 0, "each shows what the gate has pruned"


@pytest.mark.parametrize("drafts", [[], speculation_flags(2)], ids=["no drafts", "drafts"])
def test_bench_throughput_measures_our_model(drafts: list[str], tmp_path: Path) -> None:
    lengths = ["--random-input-len", "8", "--random-output-len", "4"]
    sizes = ["--dataset-name", "random", *lengths, "--num-prompts", "2", "--output-json", tmp_path / "result.json"]
    measured("throughput", "--model", NANO, *SMALL, *drafts, *sizes)
    assert json.loads((tmp_path / "result.json").read_text())["num_requests"] == 2


def test_bench_latency_measures_our_model(tmp_path: Path) -> None:
    """Of a vocabulary of 10,000 tokens or more, as it draws its prompts from so many."""
    make_checkpoint(tmp_path / "checkpoint", replace(DEFAULT, vocab_size=10_240), seed=0, dtype=torch.float32)
    sizes = [*SIZES, "--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "1"]
    result = ["--output-json", tmp_path / "result.json"]
    measured("latency", "--model", tmp_path / "checkpoint", *SMALL, *speculation_flags(1), *sizes, *result)
    assert json.loads((tmp_path / "result.json").read_text())["avg_latency"] > 0
