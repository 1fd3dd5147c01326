"""Penalties of what was generated: at every node of the drafts they are what they would be without drafts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import random
from array import array
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.penaltylib import BatchedFrequencyPenalizer as Frequency
from sglang.srt.sampling.penaltylib import BatchedMinNewTokensPenalizer, BatchedPenalizerOrchestrator
from sglang.srt.sampling.penaltylib import BatchedPresencePenalizer as Presence
from sglang.srt.sampling.penaltylib import BatchedRepetitionPenalizer as Repetition
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

from longcat_sglang import penalties
from longcat_sglang.penalties import UNLIKELY, GeneratedTokenPenalties, paths

VOCABULARY, END = 24, 5
KINDS = {Frequency, Presence, Repetition, BatchedMinNewTokensPenalizer}
SETTINGS = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": -0.7, "repetition_penalty": 1.3},
    {"min_new_tokens": 6},
    {},
    {"frequency_penalty": 0.4, "presence_penalty": 1.0, "repetition_penalty": 0.8, "min_new_tokens": 4},
]


@dataclass(eq=False)
class Batch:
    """What an orchestrator looks at."""

    reqs: list[Any]
    device: str = "cpu"


def batch_of(settings: list[dict[str, Any]], generated: list[list[int]]) -> Batch:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "stop_token_ids": None,
    }
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=END)
    return Batch(
        [
            SimpleNamespace(
                sampling_params=SimpleNamespace(**neutral | each),
                eos_token_ids=None,
                tokenizer=tokenizer,
                output_ids=array("q", tokens),
            )
            for each, tokens in zip(settings, generated, strict=True)
        ]
    )


def sampling_of(orchestrator: BatchedPenalizerOrchestrator) -> SamplingBatchInfo:
    """What a batch hands to the copy that it runs with."""
    nothing: Any = None
    needs = {name: False for name in SamplingBatchInfo.__annotations__ if name.startswith(("is_", "need_"))}
    temperatures = torch.ones(len(orchestrator.reqs()), 1)
    return SamplingBatchInfo(
        temperatures, *[nothing] * 3, **needs, vocab_size=VOCABULARY, penalizer_orchestrator=orchestrator, device="cpu"
    )


def without_drafts(settings: dict[str, Any], generated: list[int], logits: Tensor) -> Tensor:
    """By SGLang's own penalizers, given every token."""
    batch = batch_of([settings], [[]])
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch, KINDS)
    for token in generated:
        orchestrator.cumulate_output_tokens(torch.tensor([token]))
    added = torch.zeros(1, VOCABULARY)
    orchestrator.accumulate_additive_penalties(added)
    penalised = logits.unsqueeze(0) + added
    for penalizer in orchestrator.penalizers.values():
        if penalizer.is_prepared() and penalizer.is_multiplicative:
            factors = penalizer.get_scaling_penalties()
            penalised = torch.where(penalised < 0, penalised * factors, penalised / factors)
    return penalised[0]


def assert_penalised(ours: Tensor, wanted: Tensor) -> None:
    """SGLang's -inf is UNLIKELY here, times a factor for repetition."""
    torch.testing.assert_close(torch.where(ours < UNLIKELY / 10, -torch.inf, ours), wanted)


@dataclass(frozen=True)
class Tree:
    """Drafts of one request: the parent of each node, which comes before it."""

    parents: list[int]
    tokens: list[int]

    @classmethod
    def random(cls, nodes: int, draw: random.Random, *, is_chain: bool) -> Tree:
        parents = [0] + [node - 1 if is_chain else draw.randrange(node) for node in range(1, nodes)]
        return cls(parents, [draw.randrange(VOCABULARY) for _ in range(nodes)])

    def links(self) -> tuple[list[int], list[int]]:
        """As SGLang's kernel makes them: a node's first child, and its next sibling."""
        children, siblings = [-1] * len(self.parents), [-1] * len(self.parents)
        for node in range(len(self.parents) - 1, 0, -1):
            parent = self.parents[node]
            siblings[node], children[parent] = children[parent], node
        return children, siblings

    def path(self, node: int) -> list[int]:
        """Tokens of the nodes after the root that lead to this one."""
        return [] if node == 0 else [*self.path(self.parents[node]), self.tokens[node]]


def drafts_of(trees: list[Tree]) -> Any:
    links = [tree.links() for tree in trees]
    return SimpleNamespace(
        draft_token=torch.tensor([token for tree in trees for token in tree.tokens], dtype=torch.int32),
        retrieve_next_token=torch.tensor([children for children, _ in links]),
        retrieve_next_sibling=torch.tensor([siblings for _, siblings in links]),
    )


@pytest.mark.parametrize("is_chain", [True, False], ids=["chain", "tree"])
@pytest.mark.parametrize("requests", [1, 5])
def test_each_node_is_penalised_for_its_own_path(requests: int, is_chain: bool) -> None:
    draw = random.Random(0)
    for nodes in (1, 2, 4, 9):
        settings = SETTINGS[-requests:]
        generated = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (3, 1, 4, 2, 2)][-requests:]
        trees = [Tree.random(nodes, draw, is_chain=is_chain) for _ in settings]
        orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch := batch_of(settings, generated), KINDS)
        logits = torch.randn(requests * nodes, VOCABULARY, generator=torch.Generator().manual_seed(nodes))
        given = logits.clone().view(requests, nodes, -1)
        GeneratedTokenPenalties.of(orchestrator).apply(logits, drafts_of(trees))
        assert orchestrator.batch is batch
        for request, tree in enumerate(trees):
            for node in range(nodes):
                wanted = without_drafts(settings[request], generated[request] + tree.path(node), given[request, node])
                assert_penalised(logits.view(requests, nodes, -1)[request, node], wanted)


def test_without_drafts_a_request_is_penalised_for_all_that_it_generated() -> None:
    generated = [[1, 1, 2], [3], [], [4], [1, 2, 3, 1]]
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch := batch_of(SETTINGS, generated), KINDS)
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    given = logits.clone()
    GeneratedTokenPenalties.of(orchestrator).apply(logits)
    assert orchestrator.batch is batch
    for row, tokens, settings, before in zip(logits, generated, SETTINGS, given, strict=True):
        assert_penalised(row, without_drafts(settings, tokens, before))


@pytest.mark.parametrize("nodes", [1, 3], ids=["without drafts", "with drafts"])
@pytest.mark.parametrize("seed", range(4))
def test_requests_that_come_and_go_are_penalised_for_all_that_they_generated(seed: int, nodes: int) -> None:
    """As they finish, or are retracted from the cache and come back, with their tokens or without."""
    draw = random.Random(seed)
    running, retracted = batch_of(draw.choices(SETTINGS, k=2), [[], []]), list[Any]()
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, running, KINDS)
    for step in range(40):
        if running.reqs and draw.random() < 0.3:
            leaving, *keep = draw.sample(range(len(running.reqs)), len(running.reqs))
            if keep:  # SGLang drops a batch of which nothing is left
                retracted += [running.reqs[leaving]] * draw.randrange(2)
                running.reqs = [running.reqs[n] for n in sorted(keep)]
                orchestrator.filter(torch.tensor(sorted(keep)))
        if len(running.reqs) < 6 and draw.random() < 0.6:
            new = batch_of(asked := draw.choices(SETTINGS, k=draw.randrange(1, 3)), [[]] * len(asked))
            if retracted:
                new.reqs.append(retracted.pop())
                if draw.random() < 0.3:
                    new.reqs[-1].output_ids = array("q")
            orchestrator.merge(BatchedPenalizerOrchestrator(VOCABULARY, new, KINDS))
            running.reqs = running.reqs + new.reqs
        if not orchestrator.is_required:
            continue
        for request in running.reqs:
            request.output_ids.extend(draw.choices(range(VOCABULARY), k=draw.randrange(nodes + 1)))
        trees = [Tree.random(nodes, draw, is_chain=False) for _ in running.reqs]
        logits = torch.randn(len(trees) * nodes, VOCABULARY, generator=torch.Generator().manual_seed(step))
        given = logits.clone().view(len(trees), nodes, -1)
        copy = penalties.penalties_of_what_was_generated(SamplingBatchInfo.copy_for_forward, sampling_of(orchestrator))
        ours: Any = copy.penalizer_orchestrator
        ours.apply(logits, drafts_of(trees) if nodes > 1 else None)
        for request, tree, before, after in zip(running.reqs, trees, given, logits.view_as(given), strict=True):
            for node in range(nodes):
                generated = [*request.output_ids, *tree.path(node)]
                wanted = without_drafts(vars(request.sampling_params), generated, before[node])
                assert_penalised(after[node], wanted)


def test_a_step_reads_the_new_tokens_of_penalised_requests_and_no_others() -> None:
    """So that one penalised request of long answers does not slow each step."""
    read = list[int]()

    class Noted(array):  # type: ignore[type-arg]  # cannot be given one at run time
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            read.append(len(found) if isinstance(index, slice) else 1)
            return found

    lengths = {"frequency_penalty": 100, "neutral": 200, "min_new_tokens": 300}
    batch = batch_of([{"frequency_penalty": 1.0}, {}, {"min_new_tokens": 7}], [[1] * n for n in lengths.values()])
    for request in batch.reqs:
        request.output_ids = Noted("q", request.output_ids)
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch, KINDS)
    steps = list[list[int]]()
    for _ in range(3):
        GeneratedTokenPenalties.of(orchestrator).apply(torch.zeros(3, VOCABULARY))
        steps.append([number for number in read if number])
        read.clear()
        for request in batch.reqs:
            request.output_ids.extend([2, 3])
    assert steps == [[100], [2], [2]]


def test_a_request_that_has_enough_tokens_is_penalised_no_more() -> None:
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch := batch_of([{"min_new_tokens": 2}], [[1]]), KINDS)
    logits = torch.zeros(1, VOCABULARY)
    for wanted in (UNLIKELY, 0.0, 0.0):
        GeneratedTokenPenalties.of(orchestrator).apply(logits.zero_())
        assert logits[0, END] == wanted
        batch.reqs[0].output_ids.append(1)


def test_sglangs_sum_of_its_own_penalties_is_not_made() -> None:
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch := batch_of([{"min_new_tokens": 2}], [[1]]), KINDS)
    orchestrator.accumulate_additive_penalties = orchestrator.accumulate_scaling_penalties = None  # type: ignore
    copy = penalties.penalties_of_what_was_generated(SamplingBatchInfo.copy_for_forward, sampling_of(orchestrator))
    assert orchestrator.batch is batch
    assert isinstance(copy.penalizer_orchestrator, GeneratedTokenPenalties)


def test_a_grammar_that_allows_nothing_but_an_end_ends_a_request_that_is_short() -> None:
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch := batch_of([{"min_new_tokens": 6}], [[1]]), KINDS)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    GeneratedTokenPenalties.of(orchestrator).apply(logits)
    assert orchestrator.batch is batch
    assert logits.argmax() != END
    logits[:, torch.arange(VOCABULARY) != END] = -torch.inf
    torch.testing.assert_close(logits.softmax(dim=-1)[0, END], torch.tensor(1.0))


def test_a_node_that_is_pruned_leaves_the_others_as_they_are() -> None:
    """A gate takes the pointer to it away (`speculation.shorten`)."""
    whole = paths(torch.tensor([[1, 2, 3, -1]]), torch.full((1, 4), -1))
    cut = paths(torch.tensor([[1, -1, 3, -1]]), torch.full((1, 4), -1))
    assert torch.equal(cut[:, :2], whole[:, :2])


@pytest.mark.parametrize(("is_required", "queue", "waits"), [(True, [1], True), (True, [], False), (False, [1], False)])
def test_a_batch_with_penalties_waits_for_the_tokens_before_it(
    is_required: bool, queue: list[int], waits: bool
) -> None:
    sampling = SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=is_required))
    scheduler: Any = SimpleNamespace(result_queue=deque(queue))
    batch: Any = SimpleNamespace(sampling_info=sampling)

    def original(scheduler: Any, batch: Any, last_batch: Any) -> bool:
        return False

    assert penalties.process_what_is_penalised(original, scheduler, batch, last_batch=None) is waits
    assert not penalties.process_what_is_penalised(original, scheduler, None, last_batch=None)


def test_sglang_still_counts_one_token_a_step() -> None:
    """If this fails, the rows "penalties" and "order of steps under penalties" may have become unnecessary."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.speculative import eagle_utils

    assert "req.output_ids[-1] if" in inspect.getsource(ScheduleBatch.cumulate_penalty_output_tokens)
    for function in (eagle_utils.eagle_sample, eagle_utils.eagle_prepare_for_decode):
        assert "This is a relaxed version of penalties" in inspect.getsource(function)
    assert "apply_custom_logit_processor" not in inspect.getsource(eagle_utils.eagle_sample)
