"""What a prompt that fills a long context costs, and that its answer is the reference's: with drafts and prefix hits.

The model is so small that a CPU computes the 8.6 thousand million scores that 131,072 tokens, the context of
LongCat-Flash-Chat, have in each of its attentions. Answers are compared, so a figure stands for right tokens.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from longcat_core import spellings
from tests.cases import CHAT, write_checkpoint
from tests.harness import engine
from tests.long_context import CHUNK, DRAFTS, NEW_TOKENS, Conversation, config_of, conversation, prompt_of, tensors_of
from tests.oracle import relative_error
from tests.speculation import Speculated

CONTEXTS = (4096, 16384, CHAT["max_position_embeddings"])


def main(contexts: Annotated[list[int] | None, typer.Argument(help="All of them, or some.")] = None) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for context in contexts or CONTEXTS:
            directory, config = Path(temporary) / str(context), config_of(context)
            write_checkpoint(directory, config, tensors_of(config))
            rows.append({"context": context, **served(directory, context, answers_of_the_reference(context))})
    table = Table(*rows[0], title=f"{engine.NAME}: a prompt that fills the context")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)
    settings = {
        "chunk": CHUNK,
        "new_tokens": NEW_TOKENS,
        "drafts": DRAFTS,
        "model": spellings.published(config_of(CONTEXTS[-1])),
    }
    print(record.write("context", rows, **settings))


def answers_of_the_reference(context: int) -> Conversation:
    """Kept for the other engine, and for the next time, as 131,072 tokens take the reference many minutes. Remove the
    file where `tests/long_context.py` has changed."""
    kept = record.RESULTS / "context_reference.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if str(context) not in known:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:  # with its memory
            truth = apart.submit(conversation, context).result()
        rows = [[round(value, 6) for value in row] for row in truth.next_log_softmax.tolist()]
        known[str(context)] = {"answer": truth.answer, "next_answer": truth.next_answer, "next_log_softmax": rows}
        kept.write_text(json.dumps(known) + "\n")
        known = json.loads(kept.read_text())
    answer, next_answer = (Speculated(*known[str(context)][name]) for name in ("answer", "next_answer"))
    prompt = prompt_of(context)
    log_softmax = torch.tensor(known[str(context)]["next_log_softmax"])
    return Conversation(prompt, answer, prompt + answer.tokens, next_answer, log_softmax)


def served(directory: Path, context: int, truth: Conversation) -> dict[str, Any]:
    """One engine's seconds and memory.

    Raises:
        AssertionError: if its answers are not the reference's.
    """
    options = {"max_model_len": context, "cache_tokens": context + 4096, "chunk": CHUNK, "max_running": 4}
    with engine.serving(directory, draft_tokens=DRAFTS, **options) as running:
        prefill = _seconds(running, truth.prompt, truth.answer.tokens[:1])
        answer = _seconds(running, truth.prompt, truth.answer.tokens)
        before = running.cached_tokens
        following = _seconds(running, truth.next_prompt, truth.next_answer.tokens)
        assert running.cached_tokens - before > len(truth.prompt) - 32
        assert running.speculated([truth.next_prompt], NEW_TOKENS) == [truth.next_answer]
        (ours,) = running.greedy_log_softmax([truth.next_prompt], NEW_TOKENS, config_of(context).vocab_size)
        error = relative_error(ours, truth.next_log_softmax)
        assert error < 1e-4
        return {
            "prompt": len(truth.prompt),
            "prefill, s": round(prefill, 1),
            "answer after a prefix hit, s": round(answer, 2),
            "next answer after a prefix hit, s": round(following, 2),
            "error of the logits": f"{error:.0e}",
            "peak memory, MiB": _peak_memory(),
        }


def _seconds(running: engine.Engine, prompt: list[int], wanted: list[int]) -> float:
    started = time.perf_counter()
    (tokens,) = running.greedy([prompt], len(wanted))
    assert tokens == wanted
    return time.perf_counter() - started


def _peak_memory() -> int:
    """MiB that the largest process of this run has had in memory at once so far."""
    group, found = os.getpgrp(), [0]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status, stat = (process / "status").read_text(), (process / "stat").read_text()
        except OSError:  # it has ended
            continue
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        if peak and int(stat.rpartition(")")[2].split()[2]) == group:
            found.append(int(peak[1]) // 1024)
    return max(found)


if __name__ == "__main__":
    typer.run(main)
