"""Serves LongCat-Nano, drafts and all, with the stock command of an engine, and has it write Python; with `--agent` the
Nano that calls tools, which answers questions with them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import agent
from openai import APIConnectionError, DefaultHttpxClient, OpenAI, OpenAIError
from rich.console import Console
from rich.text import Text

from longcat_cli.terminal import printable
from longcat_nano import CHECKPOINT, TOOLS_CHECKPOINT

SERVER_LOG = Path(__file__).resolve().parents[1] / ".cache" / "example-server.log"
COMMANDS = Path(sys.executable).parent
"""Where `vllm` is: beside the Python that runs this."""
ENGINE = "vLLM" if find_spec("vllm") else "SGLang"
PARSERS = [
    *(["--enable-auto-tool-choice"] if ENGINE == "vLLM" else []),
    *["--tool-call-parser", "longcat", "--reasoning-parser", "longcat"],
]
"""Options with which an engine tells calls and reasoning from text."""
MODEL = "longcat-nano"
BEGINNINGS = (
    "import os\nimport sys\n\n\ndef main(",
    "class Node:\n    def __init__(self, name, value):\n        self.",
    "    for key, value in ",
)
"""What a program may begin with; the model goes on."""
QUESTION = "Return True if the path is a directory."
"""Of the kind that it was trained on: the first line of a function's docstring."""
FOR_TOOLS = (
    "What is 12 plus 30?",
    "What are 12 plus 30 and 7 times 8?",
    'Read "notes/zebra.txt".',
)
NEW_TOKENS = 64
SAMPLING = {"temperature": 0.8, "top_p": 0.9}
"""Greedy answers of a model this small repeat themselves."""
DRAFT_TOKENS = 3
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30
LOG_TAIL = 120
"""Lines: an engine's processes report a failure one after the other, the one that knows its cause first."""

console = Console(highlight=False)


def main(*arguments: str) -> int:
    """Returns the exit status: 0 only if the model answered."""
    if arguments not in ((), ("--agent",)):
        console.print(f"{shlex.join(arguments)}: wanted nothing, or --agent", style="red", markup=False)
        return 2
    _on_signals(_exit_on_signal)
    try:
        if arguments:
            with served(TOOLS_CHECKPOINT, PARSERS) as client:
                for question in FOR_TOOLS:
                    console.print(Text.assemble(("You      ", "bold"), question))
                    agent.answer(client, question)
                    console.print()
            return 0
        with served(CHECKPOINT) as client:
            written = [*(complete(client, beginning) for beginning in BEGINNINGS), chat(client)]
        console.print(what_it_took(CHECKPOINT, written), soft_wrap=True)
    except (OSError, RuntimeError, OpenAIError) as error:
        console.print(Text(f"The demo failed: {error}", style="red"))
        return 1
    return 0


@contextmanager
def served(checkpoint: Path, options: Sequence[str] = ()) -> Iterator[OpenAI]:
    """A client of a server that lasts as long as the `with` block, however that ends.

    Raises:
        RuntimeError: if the server ends, or is not ready in time; the end of its log is printed.
    """
    port = _free_port()
    command = [
        *stock_command(checkpoint),
        *options,
        "--served-model-name",
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    console.print("$ " + shlex.join(command), style="dim", markup=False, soft_wrap=True)
    SERVER_LOG.parent.mkdir(exist_ok=True)
    with SERVER_LOG.open("wb") as log:
        # A session of its own: an interrupt from the keyboard reaches only this script, which then ends the server.
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        # Proxies of the environment are for other hosts than this one.
        http_client = DefaultHttpxClient(trust_env=False)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=http_client) as client:
            _wait_until_ready(server, client)
            yield client
    except Exception:
        console.print(
            f"\nThe end of {SERVER_LOG}:\n", *_log_lines()[-LOG_TAIL:], sep="\n", markup=False, soft_wrap=True
        )
        raise
    finally:
        _end(server)


def stock_command(checkpoint: Path) -> list[str]:
    """What a user of the engine types, with a bound on the memory that it would take."""
    if ENGINE == "SGLang":
        sizes = ["--context-length", "2048", "--max-total-tokens", "16384", "--mem-fraction-static", "0.5"]
        drafts = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(DRAFT_TOKENS)]
        return [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), *sizes, *drafts]
    # Eager: ready in half a minute, no C++ compiler needed. Left to itself, vLLM takes 92 % of memory for its cache.
    sizes = ["--max-model-len", "2048", "--enforce-eager", "--kv-cache-memory-bytes", str(256 * 2**20)]
    drafts = ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": DRAFT_TOKENS})]
    return [str(COMMANDS / "vllm"), "serve", str(checkpoint), *sizes, *drafts]


def complete(client: OpenAI, beginning: str) -> str:
    """Print a program and what the model continues it with, as it comes, and return both."""
    console.print(Text(beginning, style="dim"), end="")
    stream = client.completions.create(model=MODEL, prompt=beginning, max_tokens=NEW_TOKENS, stream=True, **SAMPLING)
    return beginning + _shown(choice.text for chunk in stream for choice in chunk.choices)


def chat(client: OpenAI) -> str:
    """Print the answer to `QUESTION` as it comes, and return both as the chat template has them."""
    console.print(Text.assemble(("You      ", "bold"), QUESTION))
    console.print(Text("LongCat  ", style="bold"), end="")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=NEW_TOKENS,
        stream=True,
        **SAMPLING,
    )
    answer = _shown(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    return f"[Round 0] USER:{QUESTION} ASSISTANT:{answer}"


def _shown(parts: Iterable[str]) -> str:
    """Print the parts of an answer as they come, and return it whole.

    Raises:
        RuntimeError: if there was nothing.
    """
    answer = ""
    for part in parts:
        answer += part
        console.out(printable(part), end="", style="cyan", highlight=False)
    console.print("\n")
    if not answer:
        raise RuntimeError("the answer was empty")
    return answer


def what_it_took(checkpoint: Path, written: list[str]) -> str:
    """A sentence on the FFN experts and the drafts of what was written, counted in the reference model."""
    with console.status("counting experts and drafts in the reference model"):
        import torch
        from tokenizers import Tokenizer

        from longcat_core.inspection import inspect
        from longcat_core.reference import LongcatForCausalLM

        model = LongcatForCausalLM.from_checkpoint(checkpoint)
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        found = [inspect(model, tokenizer.encode(text).ids) for text in written]
        experts = torch.cat([each.ffn_experts for each in found], dim=1).double().mean()
        accepted = torch.cat([each.drafts[2:] for each in found if each.drafts is not None]).double().mean()
    return (
        f"{experts:.2f} of {model.config.moe_topk} choices were FFN experts, the rest cost nothing; "
        f"{accepted:.0%} of the first drafts were what the model itself held likeliest. `longcat inspect` shows which."
    )


def _wait_until_ready(server: subprocess.Popen[bytes], client: OpenAI) -> None:
    started = time.monotonic()
    with console.status(f"starting {ENGINE}") as status:
        while (elapsed := time.monotonic() - started) < START_TIMEOUT_S:
            if server.poll() is not None:
                raise RuntimeError(f"{ENGINE} ended with status {server.returncode} before it was ready")
            with suppress(APIConnectionError):
                client.with_options(max_retries=0, timeout=5).models.list()
                console.print(f"{ENGINE} is ready after {elapsed:.0f} s.")
                return
            last = (_log_lines() or [""])[-1]
            status.update(Text(f"starting {ENGINE}, {elapsed:.0f} s  {last}", overflow="ellipsis", no_wrap=True))
            time.sleep(0.5)
    raise RuntimeError(f"{ENGINE} was not ready after {START_TIMEOUT_S} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which are a process group of their own."""
    _on_signals(signal.SIG_IGN)  # nothing may come between this and the last process
    with console.status(f"ending {ENGINE}"), suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=STOP_TIMEOUT_S)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    _on_signals(_exit_on_signal)


def _on_signals(handler: signal.Handlers | Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _log_lines() -> list[str]:
    return [printable(line) for line in SERVER_LOG.read_text(errors="replace").splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
