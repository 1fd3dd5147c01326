"""What the plugin adds to the start of an engine's server for a model that is not LongCat's.

Every process of a server loads the plugin once. A fresh interpreter goes through what they have in common, imports,
plugins and the configuration of a tiny Llama, with the plugin and with the engine's variable that leaves it out, by
turns; its CPU seconds are compared, as the wall clock of such a run wavers by more than what is measured. SGLang cannot
be imported on a CPU without the plugin's preparation, so that is made both times.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import track

from benchmarks import record

SCRIPTS = {
    "vllm": """
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
EngineArgs({directory!r}, skip_tokenizer_init=True).create_engine_config()
""",
    "sglang": """
from longcat_sglang.devices.cpu.platform import prepare_cpu_as_for_longcat
prepare_cpu_as_for_longcat()
from sglang.srt.plugins import load_plugins
from sglang.srt.managers import scheduler
from sglang.srt.server_args import ServerArgs
load_plugins()
ServerArgs(model_path={directory!r}, skip_tokenizer_init=True).resolve_once()
""",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WITHOUT = {"vllm": {"VLLM_PLUGINS": ""}, "sglang": {"SGLANG_PLUGINS": "none"}}


def main(pairs: int = 9) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(LLAMA))
        cpu_seconds(Path(temporary), {})  # warms the file cache
        times = [
            (cpu_seconds(Path(temporary), {}), cpu_seconds(Path(temporary), WITHOUT[record.ENGINE]))
            for _ in track(range(pairs), "starting", console=Console(stderr=True))
        ]
    added = statistics.median(with_plugin - without for with_plugin, without in times)
    rows = [
        {
            "with plugin, CPU s": round(statistics.median(w for w, _ in times), 3),
            "without, CPU s": round(statistics.median(w for _, w in times), 3),
            "added to a process, CPU s": round(added, 3),
        }
    ]
    Console().print(rows[0])
    print(record.write("startup", rows, pairs=pairs))


def cpu_seconds(directory: Path, environment: dict[str, str]) -> float:
    """User and system time of one interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", SCRIPTS[record.ENGINE].format(directory=str(directory))],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    typer.run(main)
