"""Which drafts of the MTP layer are worth verifying: C2T's gate, its training, and what it saves (arXiv 2502.13652)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.weights import checkpoint, names
from longcat_core.weights.audit import CheckpointError

if TYPE_CHECKING:
    from longcat_core.reference import LongcatForCausalLM

GATE_FILE = Path("draft_gate") / "gate.safetensors"
"""Where a checkpoint keeps its gate: a folder of its own, as engines load every `*.safetensors` of a checkpoint's top
level as weights of the model."""
FORMAT, VERSION = "longcat-draft-gate", "1"
FEATURES = 3
"""Joint probability of the path, entropy, depth."""

_TOP = 1000
_HIDDEN = 48
EPOCHS = 10
_LEARNING_RATE, _BATCH = 1e-3, 32
# A gate outlives quantization and a change of the longest context: neither changes what the MTP layer drafts from.
_NOT_FINGERPRINTED = ("quantization", "max_position_embeddings")


class GateError(ValueError):
    """A file that is not a gate, or is another model's; the message says which, and what to do."""


# -- what is known of a draft --------------------------------------------------------------------------


def draft_features(logits: Tensor, tokens: Tensor, log_probability: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """What the gate sees of one draft step.

    logits: [B, whole vocabulary], any float dtype, of the MTP layer; tokens: int64 [B], drafted from them;
    log_probability: fp32 [B], of the path before this token, zeros at depth 1; depth: 1 for the first draft.

    Returns fp32 [B, 3] (probability of the path with this token; entropy in nats of the distribution it was drawn
    from; depth) and the path's new log-probability, fp32 [B]. The entropy is the sum of -p log p over the 1000
    likeliest tokens, where p is the softmax over the whole vocabulary and is not renormalised: the paper takes the
    top 1000 to spare the work on the rest, whose share is small.

    Only tensor operations, so that it runs within a captured graph.
    """
    normalizer = logits.float().logsumexp(dim=-1)
    top = logits.topk(min(_TOP, logits.shape[-1]), dim=-1, sorted=False).values.float()
    entropy = torch.special.entr((top - normalizer.unsqueeze(-1)).exp()).sum(dim=-1)
    drafted = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
    log_probability = log_probability + drafted - normalizer
    features = torch.stack((log_probability.exp(), entropy, torch.full_like(entropy, depth)), dim=-1)
    return features, log_probability


class Chains(NamedTuple):
    """The greedy drafts after each token of one continuation that is long enough to judge them: N chains of k."""

    tokens: Tensor
    """int64 [N, k]: chain n follows token n of the continuation."""
    features: Tensor
    """fp32 [N, k, 3], see `draft_features`."""
    accepted: Tensor
    """int64 [N]: how many leading drafts are the tokens that follow."""

    def labels(self) -> Tensor:
        """fp32 [N, k]: 1 for a draft that is accepted, with all before it, else 0."""
        return (torch.arange(self.tokens.shape[1]) < self.accepted.unsqueeze(-1)).float()


@torch.no_grad()
def draft_chains(model: LongcatForCausalLM, prompt: list[int], continuation: list[int], steps: int) -> Chains:
    """Every chain of `steps` drafts that an engine would make along a continuation.

    `continuation` is the target's own, greedy (`LongcatForCausalLM.generate`). At each of its tokens the MTP layer has
    cached what it makes of the target's hidden states and the true tokens; the first draft is made from the
    target's last hidden state and that token, each further one from the layer's own normed output and the draft before.

    Returns N = len(continuation) - steps chains, on the CPU.

    Raises:
        ValueError: if there is no prompt, no step, no chain to judge, or the model has no MTP layer.
    """
    if not prompt or steps < 1 or len(continuation) <= steps:
        raise ValueError(
            f"{len(prompt)} tokens of prompt, {len(continuation)} of continuation and {steps} steps: "
            "wanted a prompt, a step or more, and a continuation longer than the steps"
        )
    device, count, first = model.lm_head.weight.device, len(continuation) - steps, len(prompt) - 1
    sequence = torch.tensor([prompt + continuation], device=device)
    _, hidden, _ = model(sequence)
    # All first drafts in one call. The rows that follow a position do not reach it, for attention is causal.
    last = first + count
    first_logits, first_hidden, (cache,) = model.draft(hidden[:, :last], sequence[:, 1 : last + 1])

    tokens = torch.empty(count, steps, dtype=torch.int64, device=device)
    features = torch.empty(count, steps, FEATURES, dtype=torch.float32, device=device)
    tokens[:, 0] = first_logits[0, first:last].argmax(dim=-1)
    features[:, 0], log_probability = draft_features(
        first_logits[0, first:last], tokens[:, 0], torch.zeros(count, device=device), depth=1
    )
    for n in range(count):
        end, path = first + n + 1, log_probability[n : n + 1]
        hidden, past = first_hidden[:, end - 1 : end], [cache[:, :end]]
        for step in range(1, steps):
            logits, hidden, past = model.draft(hidden, tokens[n : n + 1, step - 1 : step], past)
            tokens[n, step] = logits[0, 0].argmax()
            features[n : n + 1, step], path = draft_features(logits[0], tokens[n : n + 1, step], path, step + 1)
    truth = torch.tensor(continuation[1:], device=device).unfold(0, steps, 1)
    accepted = _leading(tokens == truth)
    return Chains(tokens.cpu(), features.cpu(), accepted.cpu())


def _leading(passed: Tensor) -> Tensor:
    """How many of each chain pass before the first that does not: bool [..., k] to int64 [...]."""
    return passed.cumprod(dim=-1).sum(dim=-1)


# -- the gate ------------------------------------------------------------------------------------------


class DraftGate(nn.Module):
    """Scores a draft by its features: how likely it and all before it on its path are accepted."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        # fp32 whatever dtype an engine has made the default.
        self.hidden = nn.Linear(FEATURES, _HIDDEN, dtype=torch.float32)
        self.output = nn.Linear(_HIDDEN, 1, dtype=torch.float32)
        self.threshold = threshold
        """Drafts with a score of at least this are verified."""

    def forward(self, features: Tensor) -> Tensor:
        """features: fp32 [..., 3]. Returns scores from 0 to 1, fp32 [...]."""
        return torch.sigmoid(self._logits(features))

    def kept(self, features: Tensor) -> Tensor:
        """features: fp32 [B, k, 3] of B chains. Returns int64 [B]: how many leading drafts to verify, 0 to k.

        A chain ends at its first draft below the threshold, for a draft is only accepted after all before it.
        """
        return _leading(self(features) >= self.threshold)

    def _logits(self, features: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(features))).squeeze(-1)


def train(
    chains: Sequence[Chains], seed: int, report: Callable[[int, float], object] = lambda epoch, loss: None
) -> DraftGate:
    """Train a gate on every draft of the chains, to tell whether it and all before it were accepted.

    Binary cross-entropy, Adam at 1e-3, 10 epochs (arXiv 2502.13652); batches of 32. The same seed and chains give the
    same gate. `report` is called after each epoch with its number, from 1, and its mean loss.

    Raises:
        ValueError: if there are no drafts, or they are all accepted or all rejected.
    """
    features = torch.cat([torch.empty(0, FEATURES), *(each.features.flatten(0, 1) for each in chains)])
    labels = torch.cat([torch.empty(0), *(each.labels().flatten() for each in chains)])
    count, positive = len(labels), int(labels.sum())
    if positive in (0, count):
        raise ValueError(
            f"{positive} of {count} drafts were accepted: a gate learns only from drafts of both kinds; "
            "take more prompts, or check the MTP layer"
        )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        gate = DraftGate()
        optimizer = torch.optim.Adam(gate.parameters(), lr=_LEARNING_RATE)
        for epoch in range(1, EPOCHS + 1):
            total = 0.0
            for batch in torch.randperm(count).split(_BATCH):
                loss = F.binary_cross_entropy_with_logits(gate._logits(features[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(batch)
            report(epoch, total / count)
    return gate.requires_grad_(False).eval()


# -- what a gate saves ---------------------------------------------------------------------------------


class Step(NamedTuple):
    """One verification along a continuation."""

    position: int
    """The token of the continuation that the drafts follow."""
    verified: int
    accepted: int


class TradeOff(NamedTuple):
    """What a threshold costs and saves."""

    threshold: float
    accepted_length: float
    """Tokens a step: the accepted drafts and the target's own."""
    verified: float
    """Drafts verified a step."""


def walk(accepted: Sequence[int] | Tensor, kept: Sequence[int] | Tensor | int) -> list[Step]:
    """The steps of an engine along one continuation, from its first token, as far as `accepted` judges.

    accepted: of `Chains`; kept: drafts verified after each token of the continuation, or one number for all, which is
    a chain without a gate. The target's own token follows the accepted drafts, and the next step begins there.
    """
    steps, position = [], 0
    while position < len(accepted):
        verified = kept if isinstance(kept, int) else int(kept[position])
        steps.append(Step(position, verified, min(verified, int(accepted[position]))))
        position += steps[-1].accepted + 1
    return steps


@torch.no_grad()
def trade_off(gate: DraftGate, chains: Sequence[Chains], thresholds: Sequence[float]) -> list[TradeOff]:
    """What the gate would cost and save along the chains' walks, at each threshold; the gate's own is not changed.

    The first of the list has threshold 0, which prunes nothing: the chain without a gate.
    """
    scores = [gate(each.features) for each in chains]
    found = []
    for threshold in (0.0, *(t for t in thresholds if t != 0.0)):
        steps: list[Step] = []
        for each, score in zip(chains, scores, strict=True):
            steps += walk(each.accepted, _leading(score >= threshold))
        verified, accepted = sum(s.verified for s in steps), sum(s.accepted for s in steps)
        found.append(TradeOff(threshold, 1 + accepted / len(steps), verified / len(steps)))
    return found


def choose(trade_offs: Sequence[TradeOff], max_loss: float = 0.02) -> TradeOff:
    """The fewest drafts verified at no more than `max_loss` (a share) of the accepted length without a gate.

    Raises:
        ValueError: if none of the trade-offs has threshold 0, which is without a gate.
    """
    ungated = next((t for t in trade_offs if t.threshold == 0.0), None)
    if ungated is None:
        raise ValueError(f"{len(trade_offs)} trade-offs, none at threshold 0; pass what trade_off() returned")
    enough = [t for t in trade_offs if t.accepted_length >= (1 - max_loss) * ungated.accepted_length]
    return min(enough, key=lambda t: (t.verified, -t.accepted_length, t.threshold))


# -- the file ------------------------------------------------------------------------------------------


def fingerprint(directory: Path, config: LongcatConfig) -> str:
    """Tell one model from another by a few KB of it: sha256, in hexadecimal, over the configuration and the norms of
    the MTP layer and the main model's last, as bfloat16, so that a model's float32 and bfloat16 copies are the same.

    Raises:
        CheckpointError: if a norm is missing or misshapen, as where there is no MTP layer, or a shard cannot be read.
    """
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_FINGERPRINTED}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    shapes = names.expected_tensors(config, with_mtp=True)
    wanted = [n for n, s in shapes.items() if len(s) == 1 and n.startswith((names.MTP_PREFIX, "model.norm."))]
    norms: dict[str, Tensor] = {}
    for shard in checkpoint.shards(directory):
        with checkpoint.OpenShard(shard) as opened:
            norms |= {name: opened.get_tensor(name) for name in set(wanted) & set(opened.keys())}
    problems = [f"{n} {list(shapes[n])}" for n in wanted if n not in norms or tuple(norms[n].shape) != shapes[n]]
    if problems:
        raise CheckpointError(
            f"{directory}: no MTP layer that a gate could belong to; missing or misshapen are {', '.join(problems)}; "
            "take a checkpoint with its MTP layer"
        )
    for name in sorted(wanted):
        digest.update(f"{name}{list(shapes[name])}".encode())
        digest.update(norms[name].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save(gate: DraftGate, directory: Path, fingerprint: str) -> None:
    """Write `GATE_FILE` of the checkpoint in `directory`, for the model that has this fingerprint."""
    path = directory / GATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "version": VERSION, "threshold": repr(gate.threshold), "fingerprint": fingerprint}
    save_file({name: tensor.contiguous().cpu() for name, tensor in gate.state_dict().items()}, path, metadata)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def load(directory: Path) -> DraftGate | None:
    """The gate of the checkpoint in `directory`, on the CPU, or None where it has none.

    Whether it is this model's is decided by the checkpoint's own `config.json`, whatever an engine overrides in it.

    Raises:
        GateError: if the file is not a gate of this version, or belongs to another model.
        ConfigError, CheckpointError: if there is a gate, but the checkpoint has no MTP layer or cannot be read.
    """
    path = directory / GATE_FILE
    if not path.exists():
        return None
    again = f"train it again with `longcat train-gate {directory}`, or remove it"
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise GateError(f"{path}: truncated or not safetensors ({error}); {again}") from None
    if (found := (metadata.get("format"), metadata.get("version"))) != (FORMAT, VERSION):
        raise GateError(f"{path}: format and version {found}, wanted {(FORMAT, VERSION)}; {again}")
    threshold = math.nan
    with contextlib.suppress(ValueError):
        threshold = float(metadata.get("threshold", ""))
    if not 0 <= threshold <= 1:
        raise GateError(f"{path}: threshold {metadata.get('threshold')}, wanted a number from 0 to 1; {again}")
    with torch.device("cpu"):
        gate = DraftGate(threshold)
    shapes, wanted = ({n: list(t.shape) for n, t in each.items()} for each in (tensors, gate.state_dict()))
    if shapes != wanted:
        raise GateError(f"{path}: tensors {shapes}, wanted {wanted}; {again}")
    if unfit := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise GateError(f"{path}: {', '.join(unfit)} not finite; {again}")
    gate.load_state_dict(tensors)
    if (theirs := metadata.get("fingerprint")) != (ours := fingerprint(directory, checkpoint.read_config(directory))):
        raise GateError(f"{path}: belongs to another model, fingerprint {theirs}, wanted {ours}; {again}")
    return gate.requires_grad_(False).eval()
