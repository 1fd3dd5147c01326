"""The stock server with the stock flags for speculation, and what its `/metrics` say of drafts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.drafting import gate as drafting
from longcat_core.weights import checkpoint
from tests.cases import drafting_tensors
from tests.harness import engine
from tests.requests import COMPLETIONS, MODEL
from tests.server import Server, serving, wait_until
from tests.speculation import CASE, NEW_TOKENS, prompts_of, steps_of, the_gate, truth

DRAFT_TOKENS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A checkpoint with a tokenizer, drafts that are partly accepted, and a gate."""
    directory = tmp_path_factory.mktemp("served") / "checkpoint"
    make_checkpoint(directory, CASE.config, seed=0, dtype=torch.float32)
    for file in checkpoint.shards(directory):
        file.unlink()
    (directory / checkpoint.INDEX_NAME).unlink()
    checkpoint.save(drafting_tensors(CASE.config), directory)
    drafting.save(the_gate(), directory, drafting.fingerprint(directory, CASE.config))
    command = [
        *engine.command(directory, served_name=MODEL),
        *engine.speculation_flags(DRAFT_TOKENS),
        *engine.GATED_FLAGS,
    ]
    with serving(command, directory.with_name("server.log")) as server:
        yield server
    shutil.rmtree(directory)


def test_completions_are_the_targets_and_metrics_count_the_drafts(server: Server) -> None:
    names = [engine.METRICS.pruned, *engine.speculation_metrics([]), *engine.acceptance_metrics([], DRAFT_TOKENS)]
    before, steps = counted(server, names), []  # an engine may have warmed up with a request of its own
    for prompt in prompts_of(CASE):
        request = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        answer = server.http.post(COMPLETIONS, json=request | {"return_token_ids": True}).raise_for_status().json()
        assert answer["choices"][0]["token_ids"] == truth(CASE, prompt, NEW_TOKENS, DRAFT_TOKENS, the_gate()).tokens
        steps += steps_of(CASE, prompt, NEW_TOKENS, DRAFT_TOKENS, the_gate())
    pruned = DRAFT_TOKENS * len(steps) - sum(step.verified for step in steps)
    wanted = {engine.METRICS.pruned: pruned, **engine.speculation_metrics(steps)}
    wanted |= engine.acceptance_metrics(steps, DRAFT_TOKENS)
    wait_until(lambda: counted(server, names) == {name: before[name] + wanted[name] for name in names})


def counted(server: Server, names: list[str]) -> dict[str, float]:
    return {name: server.metric(name) for name in names}
