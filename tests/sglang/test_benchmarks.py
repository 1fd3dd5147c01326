"""SGLang's own benchmarks measure our model, with drafts and without, as docs/benchmarks.md says to run them.

They share one server, which drafts and takes its requests in two processes.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longcat_sglang.one_batch import BENCHMARK, measures_longcat
from tests.plugin import save_llama
from tests.server import Server, serving
from tests.sglang.engine import command, speculation_flags

NANO = Path(__file__).parents[2] / "longcat_nano" / "checkpoint"
WORKERS_START_IN_S = "120"
"""A worker imports SGLang first, and is ended if that takes longer than SGLang's 60 s, as on a machine in use."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", WORKERS_START_IN_S)
        flags = ["--tokenizer-worker-num", "2", *speculation_flags(2)]
        with serving([*command(NANO, served_name="nano"), *flags], log) as running:
            yield running


def measured(module: str, *arguments: str | Path, output: Path) -> str:
    """What a benchmark prints, when it has ended well."""
    words = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=output, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_token_outside_the_vocabulary_does_not_end_a_server_with_several_workers(server: Server) -> None:
    for _ in range(4):  # whichever of the workers takes it
        refused = server.http.post("/v1/completions", json={"model": "nano", "prompt": [5, 2048], "max_tokens": 2})
        assert (refused.status_code, "Token id 2048 is out of vocabulary" in refused.text) == (400, True)
    answered = server.http.post("/v1/completions", json={"model": "nano", "prompt": [5, 6], "max_tokens": 2})
    assert answered.status_code == 200


def test_bench_serving_measures_a_server_that_drafts(server: Server, tmp_path: Path) -> None:
    words = ["--backend", "sglang", "--base-url", str(server.http.base_url), "--model", NANO]
    words += ["--served-model-name", "nano"]
    sizes = [
        "--dataset-name",
        "random-ids",
        "--random-input-len",
        "8",
        "--random-output-len",
        "4",
        "--num-prompts",
        "2",
    ]
    printed = measured("sglang.bench_serving", *words, *sizes, output=tmp_path)
    assert "Successful requests:                     2" in printed
    assert "Accept length:" in printed


def test_one_batch_server_measures_a_server_that_drafts(server: Server, tmp_path: Path) -> None:
    words = ["--model-path", NANO, "--base-url", str(server.http.base_url), "--skip-warmup"]
    words += ["--dataset-name", "random-ids"]  # the default one is downloaded
    sizes = ["--batch-size", "2", "--input-len", "8", "--output-len", "4", "--result-filename", tmp_path / "r.jsonl"]
    measured("sglang.bench_one_batch_server", *words, *sizes, output=tmp_path)
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(line)["batch_size"] == 2


def test_one_batch_measures_our_class(tmp_path: Path) -> None:
    """SGLang's own is given tokens that Nano's vocabulary does not have, and ends with an error."""
    words = ["--model-path", NANO, "--dtype", "float32", "--mem-fraction-static", "0.1", "--max-total-tokens", "1024"]
    sizes = ["--batch-size", "2", "--input-len", "16", "--output-len", "3", "--result-filename", tmp_path / "r.jsonl"]
    measured(BENCHMARK, *words, *sizes, output=tmp_path)
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(line)["batch_size"] == 2


def test_bench_offline_throughput_measures_an_engine_that_drafts(tmp_path: Path) -> None:
    """It has no data set that needs no file: this is one of ShareGPT's form."""
    talk = [{"from": "human", "value": "def area(self):"}, {"from": "gpt", "value": "    return self.width"}]
    (tmp_path / "talks.json").write_text(json.dumps([{"conversations": talk}] * 4))
    words = ["--model-path", NANO, "--dtype", "float32", "--mem-fraction-static", "0.1", "--max-total-tokens", "1024"]
    words += [*speculation_flags(2), "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "3"]
    words += ["--dataset-path", tmp_path / "talks.json", "--num-prompts", "2"]
    words += ["--result-filename", tmp_path / "r.jsonl", "--skip-warmup"]
    measured("sglang.benchmark.offline_throughput", *words, output=tmp_path)
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(line)["successful_requests"] == 2


def test_plugins_are_loaded_for_the_benchmark_of_a_longcat_alone(tmp_path: Path) -> None:
    python = ["python", "-m"]
    assert measures_longcat([*python, BENCHMARK, "--model-path", str(NANO)])
    assert measures_longcat(["-c", f"/site-packages/{BENCHMARK.replace('.', '/')}.py", f"--model={NANO}"]), "a rank"
    assert not measures_longcat([*python, BENCHMARK, "--model-path", str(save_llama(tmp_path))])
    assert not measures_longcat([*python, "sglang.bench_serving", "--model", str(NANO)])
    assert not measures_longcat([*python, BENCHMARK])
