"""When choices are counted in SGLang, and which rows of a step are tokens; `engines/test_metrics.py` has the counts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter
from sglang.srt.runtime_context import get_context, get_exec, get_observability
from sglang.srt.speculative.adaptive_spec_params import resolve_candidate_steps_from_config

from longcat_core.observation.publication import Publication
from longcat_sglang import metrics
from longcat_sglang.metrics import CountedChoices
from tests.cases import DEFAULT

IDS = torch.tensor([[0, 1, -1, -1], [0, 2, 3, 5], [7, 7, 7, 7]], dtype=torch.int32)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A server's ranks, one that counts, to be changed by the test. Its options are SGLang's own, with metrics."""
    found = SimpleNamespace(
        tp_rank=0,
        moe_ep_size=1,
        is_none=lambda: True,
        has_dp_attention=False,
        attn_dp_size=1,
        attn_tp_size=1,
        attn_tp_rank=0,
    )
    for name in ("get_parallel", "get_moe_a2a_backend"):
        monkeypatch.setattr(metrics, name, lambda: found)
    monkeypatch.setattr(metrics, "is_dp_attention_enabled", lambda: found.has_dp_attention)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with get_context().override_server_args(enable_metrics=True, served_model_name="longcat"):
        yield found


def test_the_first_rank_counts_where_metrics_are_asked_for(settings: SimpleNamespace) -> None:
    assert metrics.are_counted_here()
    settings.tp_rank = 1
    assert not metrics.are_counted_here()
    settings.has_dp_attention, settings.attn_dp_size = True, 2
    assert metrics.are_counted_here(), "it says which of its rows are tokens"
    assert CountedChoices(DEFAULT).publication is None
    settings.tp_rank = 0
    with get_observability().override(enable_metrics=False):
        assert not metrics.are_counted_here()


def test_nothing_is_counted_where_memory_comes_and_goes(
    settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []  # an engine that ran in this process before may have turned loggers off
    monkeypatch.setattr(metrics.logger, "warning", said.append)
    with get_exec().features.override(enable_memory_saver=True):
        assert not metrics.are_counted_here()
    assert len(said) == 1
    assert "are not counted with --enable-memory-saver" in said[0]


@pytest.mark.parametrize("attention_ranks", [1, 2, 4])
def test_in_front_of_an_all_to_all_four_ranks_count_each_token_once(
    attention_ranks: int, settings: SimpleNamespace
) -> None:
    """Of `attention_ranks` that attend to the same rows, each has a share of them in its MoE; the others have rows of
    requests of their own. A step is padded to what these can share, and all of it is shown."""
    settings.is_none, settings.has_dp_attention = lambda: False, attention_ranks < 4
    settings.attn_tp_size, settings.attn_dp_size = attention_ranks, 4 // attention_ranks
    counted = [0] * (DEFAULT.moe_topk + 1)
    for rank in range(4):
        settings.tp_rank, settings.attn_tp_rank = rank, rank % attention_ranks
        slots = 100 * (rank // attention_ranks) + torch.arange(1, 9)
        slots[-3:] = 0
        of_all = torch.stack([IDS[row % 3] for row in range(8)])
        rows = of_all.tensor_split(attention_ranks)[settings.attn_tp_rank]
        assert metrics.are_counted_here()
        choices = CountedChoices(DEFAULT)
        assert choices.publication is not None
        batch: Any = SimpleNamespace(out_cache_loc=slots)
        choices.add([rows] * DEFAULT.num_layers, metrics.slots_of(batch))
        for number, tokens in enumerate(choices._choices.totals()[0].tokens):
            counted[number] += tokens
    groups = settings.attn_dp_size
    assert counted == [{2: 2, 4: 3}.get(number, 0) * groups for number in range(DEFAULT.moe_topk + 1)]


@pytest.mark.parametrize(("slots", "tokens"), [([40, 41, 42], 3), ([1, 17, 0], 2), ([0, 0, 0], 0)])
def test_rows_with_a_slot_in_the_cache_are_tokens(slots: list[int], tokens: int, settings: SimpleNamespace) -> None:
    """The others pad a captured graph, or are of a capture."""
    counted = CountedChoices(DEFAULT)
    batch: Any = SimpleNamespace(out_cache_loc=torch.tensor(slots))
    counted.add([IDS] * DEFAULT.num_layers, metrics.slots_of(batch))
    for layer in counted._choices.totals():
        assert sum(layer.tokens) == tokens
        assert layer.ffn_choices == [0, 2, 6, 10][tokens]


DRAFTING = {
    "a chain": ({"speculative_algorithm": "EAGLE", "speculative_num_steps": 3, "speculative_num_draft_tokens": 4}, 3),
    "adaptive": (
        {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": 3,
            "speculative_num_draft_tokens": 4,
            "speculative_adaptive": True,
        },
        max(resolve_candidate_steps_from_config()),
    ),
    "n-grams": (
        {"speculative_algorithm": "NGRAM", "speculative_num_steps": 1, "speculative_num_draft_tokens": 12},
        11,
    ),
}
"""SGLang's options as it settles them, none of which is given, and how many drafts can be accepted at once."""


@pytest.mark.parametrize("name", DRAFTING)
def test_accepted_drafts_are_counted_at_each_position_that_a_step_can_have(
    name: str, settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, most = DRAFTING[name]
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "Counter", partial(Counter, registry=registry))
    with get_context().override_server_args(enable_metrics=True, served_model_name="longcat", **options):
        counted = metrics._accepted_drafts.__wrapped__()
        counted.add([most, 1, 0])
        counted.add([1])
    (accepted,) = (each for each in registry.collect() if each.name == metrics.ACCEPTED)
    found = {each.labels["position"]: each.value for each in accepted.samples if each.name.endswith("_total")}
    assert found == {"0": 3, **{str(position): 1 for position in range(1, most)}}
    assert all(sample.labels["model_name"] == "longcat" for sample in accepted.samples)


def test_counts_are_shown_before_the_first_step(settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(Publication, "begin", lambda _: events.append("shown"))
    for counted in (CountedChoices(DEFAULT), None):
        model = SimpleNamespace(model=SimpleNamespace(counted=counted))
        scheduler: Any = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model)))
        metrics.begin_when_warm(lambda _: events.append("steps"), scheduler)
    assert events == ["shown", "steps", "steps"]
