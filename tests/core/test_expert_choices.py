"""Counting of expert choices against a case that was worked by hand, and what is shown of the counts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from torch import Tensor

from longcat_core.dial import Dial
from longcat_core.kernels.cpu import choices as compiled_choices
from longcat_core.kernels.cpu import library
from longcat_core.layers.routing import expert_rows, rank_imbalance
from longcat_core.observation.expert_choices import ExpertChoices, LayerTotals, ranks_of_experts
from longcat_core.observation.publication import Publication, samples
from tests.cases import DEFAULT

CPU = torch.device("cpu")
STEP = torch.tensor(
    [
        [[0, 1, -1], [0, 2, 3], [-1, -1, -1], [4, 0, 1]],  # the fourth row pads the step
        [[4, -1, -1], [4, -1, 3], [3, 4, 2], [-1, -1, -1]],
    ],
    dtype=torch.int32,
)
"""Two layers, four rows, three choices of five FFN experts (0 to 4) or a zero expert."""
FIRST_SLOT = 1
SLOTS = torch.tensor([3, 1, 9, 0])


@pytest.fixture(autouse=True, params=["compiled kernel", "torch"])
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiled_choices, "takes", lambda *_: False)
    elif not library.is_available():
        pytest.skip(library.description())


def counted(
    ids: Tensor | list[Tensor], slots: Tensor, ranks: int = 2, experts: int = 5, first_slot: int = FIRST_SLOT
) -> list[list[int]]:
    """A row a layer: tokens by their number of FFN experts, rows of the busiest expert, rows of the busiest rank."""
    choices = ExpertChoices(range(len(ids)), ids[0].shape[-1], experts, ranks, CPU, first_slot)
    choices.add(ids, slots)
    return [[*each.tokens, each.busiest_expert, each.busiest_rank] for each in choices.totals()]


def test_a_step_worked_by_hand() -> None:
    """Ranks have the experts 0, 1, 2 and 3, 4. Layer 0: rows of experts 2, 1, 1, 1, 0, of ranks 4, 1. Layer 1: rows of
    experts 0, 0, 1, 2, 3, of ranks 1, 5."""
    assert counted(STEP, SLOTS) == [
        [1, 0, 1, 1, 2, 4],
        [0, 1, 1, 1, 3, 5],
    ]
    assert counted([*STEP], SLOTS) == counted(STEP, SLOTS), "in one tensor, or one of each layer"


def test_a_row_that_pads_a_step_counts_nothing() -> None:
    assert counted(STEP, SLOTS) == counted(STEP[:, :3].contiguous(), SLOTS[:3])
    assert counted(STEP, SLOTS[:3]) == counted(STEP, SLOTS), "it need not be told of"
    assert counted(STEP, torch.zeros(4, dtype=torch.int64)) == [[0] * 6] * 2
    assert counted(STEP[:, :0], SLOTS[:0]) == [[0] * 6] * 2


def test_engines_have_another_first_slot() -> None:
    slots = torch.tensor([-1, 0, 2**40, -1])
    assert counted(STEP, slots, first_slot=0) == counted(STEP[:, 1:3].contiguous(), SLOTS[1:3])
    assert counted(STEP, slots, first_slot=1) == counted(STEP[:, 2:3].contiguous(), SLOTS[2:3])


@pytest.mark.skipif(not library.is_available(), reason=library.description())
@pytest.mark.parametrize(
    ("ids", "slots"),
    [
        ([STEP[0]], SLOTS),
        ([*STEP, STEP[0]], SLOTS),
        ([STEP[0], STEP[1, :3]], SLOTS),
        ([*STEP[:, :3]], SLOTS),
        ([*STEP[:, :, :2].contiguous()], SLOTS),
        ([*STEP.unsqueeze(-1)], SLOTS),
        ([STEP[0], STEP[1].long()], SLOTS),
        ([*STEP.mT.contiguous().mT], SLOTS),
        ([*STEP.to("meta")], SLOTS),
        ([*STEP], SLOTS.int()),
        ([*STEP], SLOTS.repeat_interleave(2)[::2]),
    ],
    ids=[
        "a layer less",
        "a layer more",
        "rows less in a layer",
        "rows less than slots",
        "choices less",
        "a dimension more",
        "ids int64",
        "ids strided",
        "ids elsewhere",
        "slots int32",
        "slots strided",
    ],
)
def test_the_compiled_kernel_reads_nothing_but_what_it_knows(ids: list[Tensor], slots: Tensor) -> None:
    sums = torch.zeros(2, 4, dtype=torch.int64), *torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^(ids of \d layers|slots): .*, wanted .*, contiguous"):
        compiled_choices.add_step(*sums, ids, slots, FIRST_SLOT, ranks_of_experts(5, 2), 2)
    assert not any(each.any() for each in sums)


@pytest.mark.parametrize(("experts", "ranks"), [(8, 1), (8, 4), (7, 3)])
def test_counts_are_those_of_the_load_statistics(experts: int, ranks: int) -> None:
    ids = torch.randint(-3, experts, (3, 40, 4), generator=torch.Generator().manual_seed(0)).clamp(min=-1).int()
    for layer, found in zip(ids, counted(ids, torch.ones(40, dtype=torch.int64), ranks, experts), strict=True):
        rows = expert_rows(layer, experts)
        assert found[:5] == torch.bincount((layer >= 0).sum(dim=-1), minlength=5).tolist()
        assert found[5] == rows.max()
        assert found[6] == pytest.approx(rank_imbalance(rows, ranks) * int(rows.sum()) / ranks if ranks > 1 else 0)


def test_totals_are_sums_over_steps() -> None:
    choices = ExpertChoices(range(6, 8), top_k=3, n_routed_experts=5, ranks=2, device=CPU, first_slot=FIRST_SLOT)
    for _ in range(2):
        choices.add(STEP, SLOTS)
    first, second = choices.totals()
    assert first == LayerTotals(tokens=(2, 0, 2, 2), busiest_expert=4, busiest_rank=8)
    assert (first.ffn_choices, first.zero_choices) == (10, 8)
    assert (second.ffn_choices, second.zero_choices) == (12, 6)


def test_a_compiled_step_adds_each_time_it_runs() -> None:
    """As in an engine that compiles or captures the model: the sums are changed in place."""
    choices = ExpertChoices(range(2), top_k=3, n_routed_experts=5, ranks=2, device=CPU, first_slot=FIRST_SLOT)
    compiled = torch.compile(choices.add, backend="aot_eager", fullgraph=True, dynamic=True)
    for ids in (STEP, [*STEP], STEP):
        compiled(ids, SLOTS)
    compiled(STEP[:, :3], SLOTS[:3])
    assert [each.tokens for each in choices.totals()] == [(4, 0, 4, 4), (0, 4, 4, 4)]


def test_ranks_have_experts_in_order() -> None:
    assert ranks_of_experts(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_ranks_are_shown_where_there_are_several() -> None:
    totals = LayerTotals(tokens=(1, 0, 1, 1), busiest_expert=2, busiest_rank=4)
    alone, together = ({each.metric.name for each in samples(totals, 5, ranks)} for ranks in (1, 2))
    assert together - alone == {"longcat:busiest_rank_rows", "longcat:mean_rank_rows"}


def test_a_servers_metrics_are_sums_over_its_processes(tmp_path: Path) -> None:
    """Two engines' choices in files of one directory, as prometheus_client reads them."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    choices = ExpertChoices(range(6, 8), top_k=3, n_routed_experts=5, ranks=2, device=CPU, first_slot=FIRST_SLOT)
    publication = Publication(choices, tmp_path, {"model_name": "longcat"})

    def shown(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "longcat", "layer": "6", **labels})

    assert shown("longcat:ffn_experts_per_token_count") == 0, "there before anything is counted"
    choices.add(STEP, SLOTS)
    publication.show()
    publication.show()
    buckets = [shown("longcat:ffn_experts_per_token_bucket", le=le) for le in ("0.0", "1.0", "2.0", "3.0", "+Inf")]
    assert buckets == [1, 1, 2, 3, 3]
    assert shown("longcat:ffn_experts_per_token_count") == 3
    assert shown("longcat:ffn_experts_per_token_sum") == 5
    assert [shown("longcat:expert_choices_total", kind=kind) for kind in ("ffn", "zero")] == [5, 4]
    assert (shown("longcat:busiest_expert_tokens_total"), shown("longcat:mean_expert_tokens_total")) == (2, 1)
    assert (shown("longcat:busiest_rank_rows_total"), shown("longcat:mean_rank_rows_total")) == (4, 2.5)
    for file in list(tmp_path.iterdir()):
        (tmp_path / file.name.replace("choices-", "choices-1")).write_bytes(file.read_bytes())
    assert shown("longcat:ffn_experts_per_token_count") == 6


def test_what_a_dial_is_at_is_shown_once_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """Stages of a pipeline have dials of their own layers, at the same target."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    stages = []
    for first in (0, 2):
        choices = ExpertChoices(range(first, first + 2), DEFAULT.moe_topk, DEFAULT.n_routed_experts, 1, CPU, FIRST_SLOT)
        dial = Dial(DEFAULT, 2.5, 2, CPU)
        stages.append((dial, Publication(choices, tmp_path, {"model_name": "longcat"}, dial)))
        for file in list(tmp_path.glob("*choices-*")):  # as of a process of its own
            file.rename(tmp_path / file.name.replace("choices-", f"stage{first}-"))

    def shown(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "longcat", **labels})

    assert shown("longcat:ffn_experts_target") == 2.5
    assert [shown("longcat:zero_expert_bias", layer=str(layer)) for layer in range(4)] == [0] * 4
    for dial, publication in stages:
        dial.settings.copy_(torch.tensor([0.5, -0.25]))
        publication.show()
    biases = stages[0][0].bias().tolist()
    assert [shown("longcat:zero_expert_bias", layer=str(layer)) for layer in range(4)] == [*biases, *biases]
    assert shown("longcat:ffn_experts_target") == 2.5


def test_without_a_dial_nothing_is_shown_of_one(tmp_path: Path) -> None:
    choices = ExpertChoices(range(2), top_k=3, n_routed_experts=5, ranks=1, device=CPU, first_slot=FIRST_SLOT)
    Publication(choices, tmp_path, {"model_name": "longcat"})
    assert not list(tmp_path.glob("gauge*"))
