"""What a trained model is worth on held-out text: bits a byte beside simple models', experts, and draft acceptance."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.nano.corpus import END, Corpus
from longcat_core.drafting import gate as drafting
from longcat_core.inspection import routings
from longcat_core.reference import LongcatForCausalLM

_PROMPT_TOKENS, _PROMPTS = 64, 64
_BATCH = 16


class Agreement(NamedTuple):
    """A glance at held-out text while training."""

    loss: float
    """Nats a token."""
    drafts: float | None
    """The share of first drafts that are the model's own likeliest next token, given the text before; what an engine
    accepts, except that it runs along greedy text. None without a draft layer."""


class Acceptance(NamedTuple):
    """Along the model's own greedy continuations of held-out prompts."""

    first: float
    """The share of first drafts accepted, over all positions of the continuations."""
    by_depth: list[float]
    """By number of drafts: the share of chains of which at least that many leading drafts are right."""
    accepted_length: float
    """Tokens a step of an engine that verifies the whole chain: the accepted drafts and the target's own."""
    chains: int


@torch.no_grad()
def glance(model: LongcatForCausalLM, stream: Tensor, sequence_length: int, windows: int, bf16: bool) -> Agreement:
    """stream: int32 [tokens]; `windows` of it are looked at, spread evenly, in one batch."""
    count = min(windows, len(stream) // sequence_length)
    starts = torch.linspace(0, len(stream) - sequence_length, count).long()
    device = model.lm_head.weight.device
    ids = stream[starts.unsqueeze(1) + torch.arange(sequence_length)].long().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits, hidden, _ = model(ids)
        drafted = model.draft(hidden[:, :-1], ids[:, 1:])[0] if model.model.mtp is not None else None
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    if drafted is None:
        return Agreement(float(loss), None)
    return Agreement(float(loss), float((drafted.argmax(-1) == logits[:, 1:].argmax(-1)).double().mean()))


class HeldOut(NamedTuple):
    bits_per_byte: float
    ffn_experts: list[float]
    """Mean a token, by layer."""


@torch.no_grad()
def held_out(model: LongcatForCausalLM, stream: Tensor, num_bytes: int, sequence_length: int) -> HeldOut:
    """The whole stream, each token from at least half a window before it, where there is so much.

    stream: int32 [tokens], beginning with `END`; the ends of the files are counted as tokens to predict, but not as
    bytes of the `num_bytes`.
    """
    device, half = model.lm_head.weight.device, sequence_length // 2
    # Windows overlap by half; of all but the first only the second half counts. What is short of a window at the end is
    # filled up, and does not count.
    filled = F.pad(stream.long(), (0, sequence_length), value=END)
    starts = torch.arange(0, max(1, len(stream) - half), half)
    nats, tokens, rows = 0.0, 0, torch.zeros(model.config.num_layers, dtype=torch.float64)
    for batch in starts.split(_BATCH):
        places = batch.unsqueeze(1) + torch.arange(sequence_length + 1)
        ids = filled[places.clamp(max=len(filled) - 1)].to(device)
        with routings(model) as noted:
            logits = model(ids[:, :-1])[0].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").cpu()
        predicted = places[:, 1:]
        repeated = (places[:, :1] > 0) & (predicted <= places[:, :1] + sequence_length - half)
        nats += float(loss.view_as(predicted).double()[(predicted < len(stream)) & ~repeated].sum())
        read = (places[:, :-1] < len(stream)).flatten()
        rows += torch.stack([(each.ids >= 0).cpu()[read].sum() for each in noted])
        tokens += int(read.sum())
    return HeldOut(nats / math.log(2) / num_bytes, (rows / tokens).tolist())


def acceptance(model: LongcatForCausalLM, stream: Tensor, depth: int, new_tokens: int) -> Acceptance | None:
    """Greedy continuations of pieces of held-out files, and every chain of drafts along them; None where the model ends
    all of them too soon to judge a chain.

    model: on the CPU, with its MTP layer; stream: int32 [tokens], files with `END` before each; new_tokens: the longer,
    the more a small model repeats itself, which is easily drafted.

    Raises:
        ValueError: if no file is long enough for a prompt.
    """
    chains = greedy_chains(model, stream, depth, new_tokens)
    return accepted(chains, depth) if chains else None


def accepted(chains: Sequence[drafting.Chains], depth: int) -> Acceptance:
    """chains: at least one."""
    leading = torch.cat([each.accepted for each in chains])
    steps = [step for each in chains for step in drafting.walk(each.accepted, depth)]
    by_depth = [float((leading >= d).double().mean()) for d in range(1, depth + 1)]
    length = 1 + sum(step.accepted for step in steps) / len(steps)
    return Acceptance(by_depth[0], by_depth, length, len(leading))


def greedy_chains(model: LongcatForCausalLM, stream: Tensor, depth: int, new_tokens: int) -> list[drafting.Chains]:
    """Every chain of drafts along the greedy continuations of pieces of held-out files; see `acceptance`."""
    chains = []
    for prompt in prompts(stream):
        answer = model.generate(prompt, new_tokens)
        # An engine stops there.
        answer = answer[: answer.index(END) + 1] if END in answer else answer
        if len(answer) > depth:
            chains.append(drafting.draft_chains(model, prompt, answer, depth))
    return chains


def prompts(stream: Tensor) -> list[list[int]]:
    """Pieces of single files, evenly from all over the stream, as many as are looked at.

    Raises:
        ValueError: if no file is long enough for one.
    """
    pieces = stream[: len(stream) // _PROMPT_TOKENS * _PROMPT_TOKENS].view(-1, _PROMPT_TOKENS)
    whole = pieces[(pieces != END).all(dim=1)]
    if not len(whole):
        raise ValueError(f"no held-out file has the {_PROMPT_TOKENS} tokens of a prompt; hold out more files")
    return whole[torch.linspace(0, len(whole) - 1, min(_PROMPTS, len(whole))).long()].tolist()


# -- what it is compared with ----------------------------------------------------------------------------


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """All texts in one, at gzip's best level."""
    content = "".join(texts).encode()
    return 8 * len(gzip.compress(content, compresslevel=9, mtime=0)) / len(content)


def bigram_bits_per_byte(corpus: Corpus) -> float:
    """A byte from the byte before it: counts of the train part, one added to each; measured on the held-out part."""
    trained, measured = (_bytes(part.values()) for part in corpus)
    counts = torch.bincount(256 * trained[:-1] + trained[1:], minlength=256 * 256).view(256, 256).double() + 1
    log_probability = (counts / counts.sum(dim=1, keepdim=True)).log2()
    # The first byte, which has none before it, at 8 bits.
    return float(8 - log_probability[measured[:-1], measured[1:]].sum()) / len(measured)


def _bytes(texts: Iterable[str]) -> Tensor:
    return torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8).long()
