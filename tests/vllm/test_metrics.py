"""When choices are counted in vLLM, and which rows of a step are tokens; `engines/test_metrics.py` has the counts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context

from longcat_core.inspection import inspect
from longcat_core.observation.publication import Publication
from longcat_core.reference import LongcatForCausalLM
from longcat_vllm import metrics
from longcat_vllm.metrics import METRICS_DIRECTORY, CountedChoices, count_where_statistics_are_logged
from tests.cases import CASES, DEFAULT, Case
from tests.vllm.engine import AS_THE_STOCK_COMMAND, serving

IDS = torch.tensor([[[0, 1, -1, -1], [0, 2, 3, 5], [7, 7, 7, 7]]] * DEFAULT.num_layers, dtype=torch.int32)


@pytest.fixture
def vllm_config(checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    monkeypatch.setenv(METRICS_DIRECTORY, "")
    return EngineArgs(str(checkpoint_of(CASES["default"])), skip_tokenizer_init=True).create_engine_config()


@pytest.fixture
def counted(vllm_config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedChoices]:
    monkeypatch.setenv(METRICS_DIRECTORY, str(tmp_path))
    monkeypatch.setattr("vllm.distributed.get_ep_group", lambda: SimpleNamespace(world_size=1))
    with set_current_vllm_config(vllm_config):
        yield CountedChoices(vllm_config, DEFAULT, range(DEFAULT.num_layers))


def start_engines(vllm_config: VllmConfig, log_stats: bool) -> dict[str, Any]:
    given: dict[str, Any] = {}
    count_where_statistics_are_logged(
        lambda _manager, **kwargs: given.update(kwargs), object(), vllm_config=vllm_config, log_stats=log_stats
    )
    return given


@pytest.mark.parametrize("log_stats", [False, True])
def test_choices_are_counted_where_statistics_are_logged(
    log_stats: bool, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    unknown = vllm_config.model_config.compute_hash()
    assert start_engines(vllm_config, log_stats) == {"vllm_config": vllm_config, "log_stats": log_stats}
    if log_stats:
        assert metrics._directory is not None
        monkeypatch.setenv(METRICS_DIRECTORY, metrics._directory.name)
    assert metrics.are_counted_here(vllm_config) is log_stats
    # Else a graph that was compiled without counting would be taken from vLLM's cache for one that counts.
    assert (vllm_config.model_config.compute_hash() != unknown) is log_stats


def test_one_rank_counts_of_those_with_the_same_tokens(
    vllm_config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_engines(vllm_config, log_stats=True)
    monkeypatch.setenv(METRICS_DIRECTORY, str(tmp_path))
    for rank in range(4):
        monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert metrics.are_counted_here(vllm_config) is (rank == 0)
    monkeypatch.setattr(vllm_config.parallel_config, "decode_context_parallel_size", 2)
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 1)
    assert metrics.are_counted_here(vllm_config), "it holds the other half of the cache, and counts its tokens"


def test_nothing_is_counted_where_memory_comes_and_goes(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config.model_config, "enable_sleep_mode", True)
    start_engines(vllm_config, log_stats=True)
    assert not metrics.are_counted_here(vllm_config)


@pytest.mark.parametrize(
    ("slots", "tokens"),
    [
        ([40, 41, 42], 3),
        ([0, 17, -1], 2),  # a captured graph, with a row that pads the step
        ([0, 17], 2),  # a graph in pieces: vLLM has slots of tokens only
        ([-1, -1, -1], 0),  # a dummy run
        (None, 0),  # a dummy run before there is a cache
    ],
)
@pytest.mark.parametrize("ids", [IDS, [*IDS]], ids=["the model's", "a decode step's"])
def test_rows_with_a_slot_in_the_cache_are_tokens(
    ids: Tensor | list[Tensor], slots: list[int] | None, tokens: int, counted: CountedChoices, vllm_config: VllmConfig
) -> None:
    by_layer = None if slots is None else {"model.layers.0.self_attn.0.attn": torch.tensor(slots)}
    with set_forward_context(None, vllm_config, slot_mapping=by_layer):
        counted.add(ids, rows=3)
    for layer in counted._choices.totals():
        assert sum(layer.tokens) == tokens
        assert layer.ffn_choices == [0, 2, 6, 10][tokens]


def test_each_rank_counts_its_share_of_tokens_that_are_sent_to_experts_of_others(
    counted: CountedChoices, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, three rows, of which two are tokens: the second rank has the third row, and one that makes two."""
    from vllm.model_executor.models import utils

    counted._is_shared_out = True
    tokens = 0
    for rank in range(2):
        monkeypatch.setattr(utils, "get_tensor_model_parallel_world_size", lambda: 2)
        monkeypatch.setattr(utils, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        with set_forward_context(None, vllm_config, slot_mapping={"attn": torch.tensor([5, 6])}):
            counted.add(IDS[:, [0, 1]] if rank == 0 else IDS[:, [2, 2]], rows=3)
        found = sum(counted._choices.totals()[0].tokens) - tokens
        tokens += found
        assert found == [2, 0][rank]


def test_no_busiest_rank_is_counted_where_experts_move(
    counted: CountedChoices, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.distributed.get_ep_group", lambda: SimpleNamespace(world_size=2))
    parallel, layers = vllm_config.parallel_config, range(DEFAULT.num_layers)
    for parallel.enable_expert_parallel, parallel.enable_eplb, ranks in ((True, False, 2), (True, True, 1)):
        assert CountedChoices(vllm_config, DEFAULT, layers)._choices.ranks == ranks


def test_counts_are_shown_when_the_worker_is_warm(counted: CountedChoices, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(Publication, "begin", lambda _: events.append("shown"))
    worker: Any = SimpleNamespace(get_model=lambda: SimpleNamespace(counted=counted))
    metrics.begin_when_warm(lambda _: events.append("warm"), worker)
    assert events == ["warm", "shown"]
    worker.get_model = lambda: SimpleNamespace(counted=None)
    metrics.begin_when_warm(lambda _: events.append("warm"), worker)
    assert events == ["warm", "shown", "warm"]


def test_a_compiled_model_counts_every_step(checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> None:
    """What no server of `engines/test_metrics.py` is, to start sooner. Prompts and answers are counted alike."""

    def as_in_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(METRICS_DIRECTORY, str(tmp_path))
        monkeypatch.setattr(metrics, "are_counted_here", lambda _: True)

    case, directory = CASES["default"], checkpoint_of(CASES["default"])
    reference, prompts, new_tokens = LongcatForCausalLM.from_checkpoint(directory), case.prompts(3, 20), 8
    with serving(directory, broken=as_in_a_server, **AS_THE_STOCK_COMMAND) as served:
        answers = served.greedy(prompts, new_tokens)
        totals = served.model.counted._choices.totals()
    found = [inspect(reference, prompt + answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
    for layer, of_layer in enumerate(totals):
        numbers = torch.cat([each.ffn_experts[layer] for each in found])
        assert of_layer.tokens == tuple(numbers.bincount(minlength=case.config.moe_topk + 1).tolist())
