"""C2T without an engine: chains against recomputation, features, the gate, what it saves, and its file."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longcat_core.config import LongcatConfig
from longcat_core.drafting import gate as drafting
from longcat_core.drafting.gate import Chains, DraftGate, GateError, Step, TradeOff, draft_chains, draft_features, walk
from longcat_core.quantization import Quantization
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint
from longcat_core.weights.audit import CheckpointError
from tests.cases import CASES, DEFAULT, drafting_tensors, every_spelling, in_dtype, published, write_checkpoint

STEPS = 3


@functools.cache
def model_of(name: str) -> LongcatForCausalLM:
    config = CASES[name].config
    model = LongcatForCausalLM(config).eval().requires_grad_(False)
    model.load_published(drafting_tensors(config))
    return model


@functools.cache
def example(name: str) -> tuple[list[int], list[int], Chains]:
    """A prompt, its greedy continuation, and the chains along it."""
    (prompt,) = CASES[name].prompts(1, 7)
    continuation = model_of(name).generate(prompt, 20)
    return prompt, continuation, draft_chains(model_of(name), prompt, continuation, STEPS)


def chains_of(accepted: list[int], features: Tensor) -> Chains:
    return Chains(torch.zeros(features.shape[:2], dtype=torch.int64), features, torch.tensor(accepted))


def gate_on_probability(threshold: float) -> DraftGate:
    """Scores sigmoid(20 p - 10) for a path of probability p, whatever its entropy and depth."""
    gate = DraftGate(threshold).requires_grad_(False)
    for parameter in gate.parameters():
        parameter.zero_()
    gate.hidden.weight[0, 0] = 1.0
    gate.output.weight[0, 0] = 20.0
    gate.output.bias[0] = -10.0
    return gate


def features_of(*probabilities: list[float]) -> Tensor:
    """fp32 [chains, k, 3] of these path probabilities, with entropies and depths that say nothing."""
    joint = torch.tensor(probabilities)
    return torch.stack((joint, torch.ones_like(joint), torch.ones_like(joint)), dim=-1)


# -- features ------------------------------------------------------------------------------------------


def features_in_float64(logits: Tensor, path: list[int]) -> list[tuple[float, float, float]]:
    """Of one chain, straight from the definitions. logits: [k, V]."""
    joint, found = 1.0, []
    for depth, (row, token) in enumerate(zip(logits.double().softmax(dim=-1), path, strict=True), start=1):
        joint *= float(row[token])
        likeliest = sorted(row.tolist(), reverse=True)[:1000]
        found.append((joint, -sum(p * math.log(p) for p in likeliest if p > 0), float(depth)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [320, 3000])
def test_features_are_joint_probability_entropy_of_the_top_1000_and_depth(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (2 * torch.randn(4, 3, vocabulary, generator=generator)).to(dtype)  # [step, chain, V]
    tokens = logits.argmax(dim=-1)
    tokens[1] = torch.randint(vocabulary, (3,), generator=generator)  # a draft need not be the likeliest
    log_probability, found = torch.zeros(3), []
    for step in range(4):
        features, log_probability = draft_features(logits[step], tokens[step], log_probability, step + 1)
        found.append(features)
    assert torch.stack(found).dtype == log_probability.dtype == torch.float32
    for chain in range(3):
        wanted = torch.tensor(features_in_float64(logits[:, chain], tokens[:, chain].tolist()), dtype=torch.float64)
        torch.testing.assert_close(torch.stack(found)[:, chain].double(), wanted, rtol=1e-4, atol=1e-7)


def test_tokens_that_cannot_be_drawn_have_no_part_in_the_entropy() -> None:
    logits = torch.full((1, 1200), -math.inf)
    logits[0, :4] = 0.0
    features, log_probability = draft_features(logits, torch.tensor([2]), torch.zeros(1), 1)
    torch.testing.assert_close(features, torch.tensor([[0.25, math.log(4), 1.0]]))
    torch.testing.assert_close(log_probability, torch.tensor([math.log(0.25)]))


def test_scoring_reads_no_value_back_to_the_host() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no values to read
        logits, tokens = torch.empty(2, 2000), torch.zeros(2, dtype=torch.int64)
        features, _ = draft_features(logits, tokens, torch.zeros(2), 1)
        kept = DraftGate(0.5).kept(torch.stack((features, features), dim=1))
    assert kept.shape == (2,)
    assert kept.dtype == torch.int64


# -- chains --------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_chain(model: LongcatForCausalLM, sequence: list[int], steps: int) -> tuple[list[int], Tensor]:
    """The drafts after a sequence and their logits [steps, V], each from all positions anew, without a cache."""
    _, hidden, _ = model(torch.tensor([sequence]))
    hidden, next_tokens = hidden[:, :-1], list(sequence[1:])
    drafts: list[int] = []
    logits_of_step = []
    for _ in range(steps):
        logits, own, _ = model.draft(hidden, torch.tensor([next_tokens]))
        drafts.append(int(logits[0, -1].argmax()))
        logits_of_step.append(logits[0, -1])
        hidden, next_tokens = torch.cat((hidden, own[:, -1:]), dim=1), [*next_tokens, drafts[-1]]
    return drafts, torch.stack(logits_of_step)


@pytest.mark.parametrize("name", ["default", "odd_counts", "yarn_mscale_all_dim"])
def test_chains_are_those_of_recomputing_everything_at_every_token(name: str) -> None:
    prompt, continuation, chains = example(name)
    assert chains.tokens.shape == (17, STEPS)
    assert chains.features.shape == (17, STEPS, 3)
    for n in range(17):
        drafts, logits = naive_chain(model_of(name), prompt + continuation[: n + 1], STEPS)
        assert chains.tokens[n].tolist() == drafts, n
        wanted = torch.tensor(features_in_float64(logits, drafts))
        torch.testing.assert_close(chains.features[n], wanted, rtol=1e-3, atol=1e-5)
        right = [draft == true for draft, true in zip(drafts, continuation[n + 1 :], strict=False)]
        assert int(chains.accepted[n]) == (right.index(False) if False in right else STEPS), n
    assert 0 < chains.labels().mean() < 1, "the case has drafts of both kinds"


def test_a_chain_of_one_is_the_draft_of_the_mtp_layer() -> None:
    prompt, continuation, _ = example("default")
    chains = draft_chains(model_of("default"), prompt, continuation, 1)
    ids = torch.tensor([prompt + continuation])
    _, hidden, _ = model_of("default")(ids)
    logits, _, _ = model_of("default").draft(hidden[:, :-1], ids[:, 1:])
    drafted = logits[0, len(prompt) - 1 :].argmax(dim=-1)  # the first row's token is the continuation's first
    assert chains.tokens[:, 0].tolist() == drafted[:-1].tolist()
    assert chains.accepted.tolist() == (drafted[:-1] == torch.tensor(continuation[1:])).long().tolist()


def test_longer_chains_begin_as_shorter_ones_do() -> None:
    prompt, continuation, chains = example("default")
    shorter = draft_chains(model_of("default"), prompt, continuation, 2)
    assert torch.equal(shorter.tokens[:17], chains.tokens[:, :2])
    torch.testing.assert_close(shorter.features[:17], chains.features[:, :2])
    assert torch.equal(shorter.accepted[:17], chains.accepted.clamp(max=2))


def test_labels_are_one_up_to_the_first_draft_that_is_not_accepted() -> None:
    chains = chains_of([0, 2, 3], torch.zeros(3, 3, 3))
    assert chains.labels().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("prompt", "continuation", "steps"), [([], [1, 2, 3], 1), ([1], [2, 3], 2), ([1], [2, 3], 0)], ids=str
)
def test_chains_that_cannot_be_judged_are_refused(prompt: list[int], continuation: list[int], steps: int) -> None:
    with pytest.raises(ValueError, match="wanted a prompt, a step or more"):
        draft_chains(model_of("default"), prompt, continuation, steps)


# -- the gate ------------------------------------------------------------------------------------------


def test_a_chain_ends_at_its_first_draft_below_the_threshold() -> None:
    chains = features_of([0.9, 0.4, 0.8], [0.9, 0.8, 0.7], [0.1, 0.9, 0.9], [0.5, 0.5, 0.4])
    assert gate_on_probability(0.5).kept(chains).tolist() == [1, 3, 0, 2]  # a score of the threshold is enough
    assert gate_on_probability(0.0).kept(chains).tolist() == [3, 3, 3, 3]
    assert gate_on_probability(1.0).kept(chains).tolist() == [0, 0, 0, 0]


def test_scores_are_those_of_a_relu_layer_of_48_and_a_sigmoid() -> None:
    gate, features = DraftGate(), torch.randn(5, 2, 3)
    w1, b1, w2, b2 = gate.hidden.weight, gate.hidden.bias, gate.output.weight, gate.output.bias
    assert w1.shape == (48, 3)
    wanted = 1 / (1 + (-((features @ w1.T + b1).clamp(min=0) @ w2[0] + b2)).exp())
    torch.testing.assert_close(gate(features), wanted)


def toy(seed: int) -> Chains:
    """Chains of 3 whose drafts are accepted while the path's probability is above 0.4, at any entropy."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand(400, 3, generator=generator).cumprod(dim=-1) ** 0.5
    entropy = 5 * torch.rand(400, 3, generator=generator)
    depth = torch.arange(1.0, 4.0).expand(400, 3)
    accepted = (joint > 0.4).cumprod(dim=-1).sum(dim=-1)
    return Chains(torch.zeros(400, 3, dtype=torch.int64), torch.stack((joint, entropy, depth), dim=-1), accepted)


def test_training_separates_what_can_be_separated() -> None:
    losses: list[tuple[int, float]] = []
    gate = drafting.train(
        [toy(seed) for seed in range(3)], seed=0, report=lambda epoch, loss: losses.append((epoch, loss))
    )
    assert [epoch for epoch, _ in losses] == list(range(1, 11))
    assert losses[-1][1] < 0.3 < losses[0][1]
    unseen = toy(3)
    right = (gate(unseen.features) >= 0.5) == unseen.labels().bool()
    assert right.float().mean() > 0.95


def test_training_depends_on_its_seed_alone_and_leaves_the_callers_generator_be() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first = drafting.train([toy(0)], seed=3)
    assert torch.equal(torch.rand(1), wanted)
    with torch.no_grad():
        again, other = (drafting.train([toy(0)], seed=seed) for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.hidden.weight, other.hidden.weight)


@pytest.mark.parametrize("accepted", [[], [0, 0], [3, 3]], ids=["none", "all_rejected", "all_accepted"])
def test_drafts_of_one_kind_teach_nothing(accepted: list[int]) -> None:
    with pytest.raises(ValueError, match="drafts of both kinds"):
        drafting.train([chains_of(accepted, torch.zeros(len(accepted), 3, 3))] if accepted else [], seed=0)


# -- what it saves -------------------------------------------------------------------------------------


def test_a_walk_goes_on_after_the_targets_own_token() -> None:
    accepted = [2, 0, 3, 1, 0, 3]
    assert walk(accepted, 3) == [Step(0, 3, 2), Step(3, 3, 1), Step(5, 3, 3)]
    kept = torch.tensor([1, 3, 2, 0, 0, 1])  # prunes a draft that was right, and then another
    assert walk(torch.tensor(accepted), kept) == [Step(0, 1, 1), Step(2, 2, 2), Step(5, 1, 1)]
    assert walk(accepted, 0) == [Step(n, 0, 0) for n in range(6)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_a_walk_visits_every_token_once_and_a_perfect_gate_costs_nothing(pairs: list[tuple[int, int]]) -> None:
    accepted, kept = [a for a, _ in pairs], [k for _, k in pairs]
    steps = walk(accepted, kept)
    covered = [step.position + offset for step in steps for offset in range(step.accepted + 1)]
    assert covered == list(range(len(covered)))
    assert len(covered) >= len(accepted)
    perfect = walk(accepted, accepted)
    assert [s.position for s in perfect] == [s.position for s in walk(accepted, 4)]
    assert all(step.verified == step.accepted for step in perfect)


def test_a_trade_off_counts_tokens_and_drafts_a_step_over_all_walks() -> None:
    first = chains_of([1, 0, 2, 0], features_of([0.9, 0.1], [0.9, 0.9], [0.9, 0.9], [0.1, 0.1]))
    second = chains_of([0, 1], features_of([0.1, 0.1], [0.4, 0.1]))
    gate = gate_on_probability(0.77)
    # Without a gate: steps at 0, 2 of the first, 0, 1 of the second; 8 drafts, 1 + 2 + 0 + 1 accepted.
    # At 0.5: the same steps, 1 + 2 + 0 + 0 drafts; but the draft at 1 of the second is pruned.
    found = drafting.trade_off(gate, [first, second], [0.5])
    assert found == [TradeOff(0.0, 1 + 4 / 4, 8 / 4), TradeOff(0.5, 1 + 3 / 4, 3 / 4)]
    assert gate.threshold == 0.77


def test_the_fewest_drafts_within_the_loss_are_chosen() -> None:
    trade_offs = [TradeOff(0.0, 2.0, 4.0), TradeOff(0.1, 2.0, 3.0), TradeOff(0.2, 1.97, 2.0), TradeOff(0.3, 1.93, 1.0)]
    assert drafting.choose(trade_offs) == trade_offs[2]
    assert drafting.choose(trade_offs, max_loss=0.0) == trade_offs[1]
    assert drafting.choose(trade_offs, max_loss=0.05) == trade_offs[3]
    assert drafting.choose([*trade_offs, TradeOff(0.25, 1.98, 2.0)]).threshold == 0.25
    with pytest.raises(ValueError, match="none at threshold 0"):
        drafting.choose(trade_offs[1:])


# -- the file ------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint with a gate."""
    write_checkpoint(tmp_path, DEFAULT, published(DEFAULT))
    torch.manual_seed(1)
    drafting.save(DraftGate(0.35), tmp_path, drafting.fingerprint(tmp_path, DEFAULT))
    return tmp_path


def rewrite(directory: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    """Change a gate's tensors and metadata in its file."""
    path = directory / drafting.GATE_FILE
    with safe_open(path, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_a_gate_is_read_as_it_was_written(directory: Path) -> None:
    torch.manual_seed(1)
    written, read = DraftGate(), drafting.load(directory)
    assert read is not None
    assert read.threshold == 0.35
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), written.parameters(), strict=True))


def test_a_gate_is_fp32_on_the_cpu_whatever_an_engine_has_made_the_default(directory: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            gate = drafting.load(directory)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gate is not None
    assert {(p.dtype, p.device.type) for p in gate.parameters()} == {(torch.float32, "cpu")}
    assert gate(torch.ones(2, 3)).isfinite().all()


def test_a_checkpoint_without_a_gate_has_none(tmp_path: Path) -> None:
    assert drafting.load(write_checkpoint(tmp_path, DEFAULT, published(DEFAULT))) is None


def test_a_gate_is_not_taken_for_weights_of_the_model(directory: Path) -> None:
    (directory / checkpoint.INDEX_NAME).unlink(missing_ok=True)  # so that every file of the top level counts
    checkpoint.verify(directory, DEFAULT)


def without(name: str) -> Callable[[dict[str, Tensor], dict[str, str]], Any]:
    return lambda tensors, metadata: tensors.pop(name)


BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "no_format": (lambda tensors, metadata: metadata.pop("format"), r"\(None, '1'\), wanted \('longcat-draft-gate'"),
    "other_version": (lambda tensors, metadata: metadata.update(version="2"), r"'2'\), wanted .*'1'\)"),
    "no_threshold": (lambda tensors, metadata: metadata.pop("threshold"), "threshold None, wanted a number"),
    "nan_threshold": (lambda tensors, metadata: metadata.update(threshold="nan"), "threshold nan, wanted"),
    "threshold_above_1": (lambda tensors, metadata: metadata.update(threshold="1.5"), "threshold 1.5, wanted"),
    "threshold_below_0": (lambda tensors, metadata: metadata.update(threshold="-0.1"), "threshold -0.1, wanted"),
    "missing": (without("output.bias"), "wanted .*'output.bias'"),
    "extra": (lambda tensors, metadata: tensors.update(more=torch.zeros(1)), "'more'"),
    "misshapen": (lambda tensors, metadata: tensors.update({"hidden.bias": torch.zeros(47)}), "'hidden.bias': .47"),
    "not_finite": (lambda tensors, metadata: tensors["output.weight"].fill_(math.nan), "output.weight not finite"),
    "no_fingerprint": (lambda tensors, metadata: metadata.pop("fingerprint"), "belongs to another model"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_gate_is_refused_by_name(name: str, directory: Path) -> None:
    change, complaint = BAD_FILES[name]
    rewrite(directory, change)
    with pytest.raises(GateError, match=complaint) as refusal:
        drafting.load(directory)
    assert str(directory / drafting.GATE_FILE) in str(refusal.value)
    assert "longcat train-gate" in str(refusal.value)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_gate_is_refused(size: int, directory: Path) -> None:
    path = directory / drafting.GATE_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(GateError, match="truncated or not safetensors"):
        drafting.load(directory)


def test_a_gate_of_another_model_is_refused(directory: Path) -> None:
    checkpoint.save(published(DEFAULT, seed=1), directory)
    with pytest.raises(GateError, match="belongs to another model"):
        drafting.load(directory)


def test_a_gate_without_an_mtp_layer_is_refused(directory: Path) -> None:
    checkpoint.save(published(DEFAULT, with_mtp=False), directory)
    with pytest.raises(CheckpointError, match=r"no MTP layer .* model\.mtp\.norm\.weight \[64\]"):
        drafting.load(directory)


# -- whose gate it is ----------------------------------------------------------------------------------


def identity(tmp_path: Path, tensors: dict[str, Tensor], config: LongcatConfig = DEFAULT) -> str:
    return drafting.fingerprint(write_checkpoint(tmp_path, config, tensors), config)


def test_copies_of_a_model_in_float32_and_bfloat16_share_a_fingerprint(tmp_path: Path) -> None:
    tensors = published(DEFAULT)
    assert identity(tmp_path / "a", tensors) == identity(tmp_path / "b", in_dtype(tensors, torch.bfloat16))


def test_shards_and_spellings_of_a_model_share_a_fingerprint(tmp_path: Path) -> None:
    config = CASES["yarn_mscale_all_dim"].config
    wanted = identity(tmp_path, published(config), config)
    checkpoint.save(published(config), tmp_path, max_shard_size=100_000)
    assert len(checkpoint.shards(tmp_path)) > 2
    for spelling, raw in every_spelling(config).items():
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert drafting.fingerprint(tmp_path, checkpoint.read_config(tmp_path)) == wanted, spelling


def test_quantizing_a_model_or_changing_its_context_keeps_its_fingerprint(tmp_path: Path) -> None:
    wanted = identity(tmp_path, published(DEFAULT))
    copy = replace(DEFAULT, quantization=Quantization("fp8", disabled=("mtp",)), max_position_embeddings=64)
    assert drafting.fingerprint(tmp_path, copy) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.mtp.norm.weight",
        "model.mtp.layers.0.hnorm.m.weight",
        "model.mtp.layers.0.self_attn.kv_a_layernorm.weight",
    ],
)
def test_another_norm_is_another_model(name: str, tmp_path: Path) -> None:
    tensors = published(DEFAULT)
    wanted = identity(tmp_path / "a", tensors)
    tensors[name][-1] *= 1.01
    assert identity(tmp_path / "b", tensors) != wanted


def test_another_configuration_is_another_model(tmp_path: Path) -> None:
    wanted = identity(tmp_path, published(DEFAULT))
    for other in (replace(DEFAULT, moe_topk=3), replace(DEFAULT, rope=replace(DEFAULT.rope, theta=1e6))):
        assert drafting.fingerprint(tmp_path, other) != wanted


def test_a_fingerprint_says_which_shard_is_broken(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, DEFAULT, published(DEFAULT))
    (shard,) = checkpoint.shards(directory)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=shard.name):
        drafting.fingerprint(directory, DEFAULT)
