"""What is measured on held-out text, against the same counted in a plainer way."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gzip
import math

import pytest
import torch
import torch.nn.functional as F

from examples.nano import measure
from examples.nano.corpus import END, Corpus
from examples.nano.settings import PRESETS
from examples.nano.trainer import initialize
from longcat_core.inspection import inspect
from longcat_core.reference import LongcatForCausalLM


@pytest.fixture(scope="module")
def model() -> LongcatForCausalLM:
    torch.manual_seed(0)
    made = LongcatForCausalLM(PRESETS["tiny"].model.config())
    initialize(made)
    return made


@pytest.mark.parametrize("length", [10, 17, 32, 33, 64, 65, 200])
@torch.no_grad()
def test_every_token_counts_once_with_at_least_half_a_window_before_it(model: LongcatForCausalLM, length: int) -> None:
    stream = torch.randint(8, 320, (length,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    found = measure.held_out(model, stream, num_bytes=100, sequence_length=32)
    nats = 0.0
    for place in range(1, length):
        # The first window gives all it has; of each later one, which begins 16 on, the second half counts.
        start = max(0, 16 * ((place - 1) // 16 - 1))
        logits = model(stream[start:place].long().unsqueeze(0))[0][0, -1]
        nats += float(F.cross_entropy(logits, stream[place].long()))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-4)


def test_ffn_experts_are_counted_over_the_tokens_that_are_read(model: LongcatForCausalLM) -> None:
    stream = torch.randint(8, 320, (20,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    found = measure.held_out(model, stream, num_bytes=100, sequence_length=32)
    wanted = inspect(model, stream.tolist()).ffn_experts.double().mean(dim=1)
    assert found.ffn_experts == pytest.approx(wanted.tolist())


def test_a_glance_gives_the_loss_and_what_the_drafts_agree_in(model: LongcatForCausalLM) -> None:
    stream = torch.randint(8, 320, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    found = measure.glance(model, stream, sequence_length=64, windows=4, bf16=False)
    ids = stream.long().unsqueeze(0)
    with torch.no_grad():
        logits, hidden, _ = model(ids)
        drafted = model.draft(hidden[:, :-1], ids[:, 1:])[0]
    assert found.loss == pytest.approx(float(F.cross_entropy(logits[0, :-1], ids[0, 1:])), rel=1e-5)
    agreed = [int(drafted[0, n].argmax()) == int(logits[0, n + 1].argmax()) for n in range(63)]
    assert found.drafts == pytest.approx(sum(agreed) / 63)


def test_acceptance_is_of_prompts_from_within_files(model: LongcatForCausalLM) -> None:
    lengths = (10, 200, 70, 300)
    files = [torch.full((length,), 8 + n, dtype=torch.int32) for n, length in enumerate(lengths)]
    end = torch.tensor([END], dtype=torch.int32)
    stream = torch.cat([end, *(part for each in files for part in (each, end))])
    prompts = measure.prompts(stream)
    assert {len(prompt) for prompt in prompts} == {64}
    assert {tuple(set(prompt)) for prompt in prompts} == {(9,), (11,)}, "the third file has no whole piece"
    found = measure.acceptance(model, stream, depth=3, new_tokens=8)
    assert found is not None
    assert 0 < found.chains <= 5 * len(prompts)
    assert 0 <= found.by_depth[2] <= found.by_depth[1] <= found.by_depth[0] == found.first <= 1
    assert 1 <= found.accepted_length <= 4
    with pytest.raises(ValueError, match="hold out more files"):
        measure.prompts(stream[:40])
    assert measure.acceptance(model, stream, depth=8, new_tokens=8) is None, "no answer is longer than a chain"


def test_the_simple_models_are_measured_in_bits_a_byte() -> None:
    corpus = Corpus({"a.py": "abab"}, {"b.py": "aab"})
    seen = [(0 + 1) / (2 + 256), (2 + 1) / (2 + 256)]  # a after a, b after a
    assert measure.bigram_bits_per_byte(corpus) == pytest.approx((8 - sum(map(math.log2, seen))) / 3)
    text = "def f(): ...\n" * 50
    assert measure.gzip_bits_per_byte([text]) == pytest.approx(8 * len(gzip.compress(text.encode())) / len(text))
