"""One data-parallel rank of an engine, as a process: `python -m tests.vllm.data_parallel FOLDER RANK RANKS PORT`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Product = tuple[int, int]
"""Columns that a matrix product reads, and that it makes."""


class Answer(NamedTuple):
    """Of one data-parallel rank, which can be several tensor-parallel ones."""

    tokens: list[list[int]]
    """Of each of its prompts."""
    sent_bytes: int
    """To experts of other ranks meanwhile."""
    operations: list[str | Product]
    """Of one step of the first of them, in the order in which they ran: names of operators, without those that are not
    looked at."""


def answers(
    checkpoint: Path, folder: Path, prompts: Sequence[list[list[int]]], new_tokens: int, **engine_args: Any
) -> list[Answer]:
    """Of as many ranks as there are lists of prompts, decoding greedily.

    Raises:
        AssertionError: with the log of a rank that fails.
    """
    arguments = {"expert_parallel": True, "worker_extension_cls": "tests.vllm.noted_steps.NotedSteps"} | engine_args
    task = {"checkpoint": str(checkpoint), "prompts": prompts, "new_tokens": new_tokens, "arguments": arguments}
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(task))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = range(len(prompts))
    logs = [(folder / f"log.{rank}").open("w+") for rank in numbers]
    command = [sys.executable, "-m", "tests.vllm.data_parallel", str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(len(prompts)), str(port)], stdout=log, stderr=subprocess.STDOUT)
        for rank, log in zip(numbers, logs, strict=True)
    ]
    try:
        for rank, log in zip(ranks, logs, strict=True):
            assert rank.wait(timeout=600) == 0, Path(log.name).read_text()
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            log.close()
    return [Answer(*json.loads((folder / f"answer.{rank}").read_text())) for rank in numbers]


def main(folder: Path, rank: int) -> None:
    from tests.vllm.engine import serving

    task = json.loads((folder / "task.json").read_text())
    with serving(Path(task["checkpoint"]), **task["arguments"]) as served:
        before = served.llm.collective_rpc("noted")
        tokens = served.greedy(task["prompts"][rank], task["new_tokens"])
        after = served.llm.collective_rpc("noted")
    sent = [new - old for (new, _), (old, _) in zip(after, before, strict=True)]
    (folder / f"answer.{rank}").write_text(json.dumps(Answer(tokens, sum(sent), after[0][1])))


if __name__ == "__main__":
    directory, rank, ranks, port = sys.argv[1:]
    os.environ |= {
        "VLLM_DP_SIZE": ranks,
        "VLLM_DP_RANK": rank,
        "VLLM_DP_RANK_LOCAL": rank,
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": port,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    main(Path(directory), int(rank))
