"""The training record that lies beside a checkpoint: settings, corpus, machine, curves, and what was measured."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer

from examples.nano import classes, measure
from examples.nano.corpus import Corpus
from examples.nano.curves import Curves
from examples.nano.settings import Settings
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights.checkpoint import shards

FILE = "record.json"
NEW_TOKENS = 48


def results(
    model: LongcatForCausalLM, tokenizer: Tokenizer, corpus: Corpus, stream: torch.Tensor, settings: Settings
) -> dict[str, Any]:
    """What the model, on the CPU, is worth on the held-out part of the corpus, whose tokens are `stream`."""
    texts = corpus.held_out.values()
    num_bytes = sum(len(text.encode()) for text in texts)
    found = measure.held_out(model, stream, num_bytes, settings.sequence_length)
    drafts = None
    if model.model.mtp is not None:
        drafts = measure.acceptance(model, stream, settings.draft_layer.depth, NEW_TOKENS)
    mean = sum(found.ffn_experts) / len(found.ffn_experts)
    target = settings.zero_experts.target
    return {
        "held_out_bytes": num_bytes,
        "held_out_tokens": len(stream),
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_of_a_byte_bigram": measure.bigram_bits_per_byte(corpus),
        "bits_per_byte_of_gzip": measure.gzip_bits_per_byte(texts),
        "ffn_experts_per_token": mean,
        "ffn_experts_per_token_by_layer": found.ffn_experts,
        "ffn_experts_off_target": abs(mean / target - 1),
        "drafts": None if drafts is None else drafts._asdict(),
        "classes": {
            name: each._asdict() | {"read": each.read._asdict(), "predicted": each.predicted._asdict()}
            for name, each in classes.spent(model, tokenizer, texts, settings.sequence_length).items()
        },
    }


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    names = {"cpu": _processor, "cuda": lambda: torch.cuda.get_device_name(device)}
    return {
        "device": names.get(device.type, lambda: str(device))(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "longcat-serving": version("longcat-serving"),
    }


def record(
    settings: Settings,
    corpus: Corpus,
    train_tokens: int,
    model: LongcatForCausalLM,
    directory: Path,
    machine: dict[str, Any],
    seconds: float,
    curves: Curves,
    results: dict[str, Any],
) -> dict[str, Any]:
    """directory: of the checkpoint, whose weights `model` has."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "machine": machine,
        "settings": settings.model_dump(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": digests(directory),
        "corpus": {
            "sha256": corpus.digest(),
            "train_files": len(corpus.train),
            "train_bytes": sum(len(text.encode()) for text in corpus.train.values()),
            "train_tokens": train_tokens,
            "epochs": settings.steps * settings.batch_size * settings.sequence_length / train_tokens,
            "held_out_files": list(corpus.held_out),
        },
        "results": results,
        "curves": asdict(curves),
    }


def digests(directory: Path) -> dict[str, str]:
    """sha256 of each of a checkpoint's safetensors files, in hexadecimal, by name."""
    return {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards(directory)}


def _processor() -> str:
    """As Linux names it, or else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
