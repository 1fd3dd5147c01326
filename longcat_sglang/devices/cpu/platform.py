"""Prepares a CPU for a LongCat: SGLang's own CPU platform, with a stand-in for `sgl_kernel`, which it imports."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from longcat_core.family import Member, member_of

PREPARED = "LONGCAT_SGLANG_CPU"
"""Environment variable by which a process tells those that it starts to prepare a CPU as it did."""
SERVERS = ("sglang.launch_server", "sglang.benchmark.one_batch")
"""Modules that run a model in their own process, and ask for the device before they import SGLang's engine."""
ENGINE_MODULE = "sglang.srt.entrypoints.engine"
"""Imported by every process that runs an engine, and by no client, gateway or load generator."""


def prepare_cpu() -> None:
    """Let SGLang serve a LongCat on a machine without accelerator and without `sgl_kernel`. Harmless when called again.

    Called when SGLang is imported, in whatever process, as a server's modules ask once, at their import, whether they
    are on a CPU. Where the command line is a server's and names a model, something is changed if that is a LongCat.
    Else it is in processes that a prepared one has started, and, where the command line is no server's, in a process
    that imports SGLang's engine, whose model is not known yet. Nothing is changed where there is an accelerator or
    `sgl_kernel`, which is never shadowed; without them SGLang's engine runs no model at all.
    """
    if not _is_bare_cpu():
        return
    serves = is_server(sys.orig_argv)
    model = model_of(sys.orig_argv) if serves else None
    if model is not None:
        if is_longcat(model):
            _prepare()
    elif os.environ.get(PREPARED):
        _prepare()
    elif not serves and not any(isinstance(finder, _PreparesForAnEngine) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PreparesForAnEngine())


def prepare_cpu_as_for_longcat() -> None:
    """The same in a process that asks what a server of a LongCat would do here."""
    if _is_bare_cpu():
        _prepare()


def _is_bare_cpu() -> bool:
    return not torch.accelerator.is_available() and importlib.util.find_spec("sgl_kernel") is None


def is_server(command: Sequence[str]) -> bool:
    """Whether it is `python -m sglang.launch_server`, another of `SERVERS`, or `sglang serve`."""
    return any(
        (word == "-m" and after in SERVERS) or (Path(word).name == "sglang" and after == "serve")
        for word, after in pairwise(command)
    )


def model_of(command: Sequence[str]) -> str | None:
    """The model that a command line of SGLang's names, by an option, in a file of options or after `serve`; None if
    there is none."""
    for option, value in _options(command):
        if option in ("--model-path", "--model") or (option == "serve" and value and not value.startswith("-")):
            return value
        if option == "--config" and Path(value).is_file():
            import yaml

            given = yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}
            named = [given[key] for key in ("model-path", "model_path", "model") if key in given]
            if named:
                return str(named[0])
    return None


def _options(command: Sequence[str]) -> list[tuple[str, str]]:
    """Each option with what follows it, after `=` or as the next word."""
    words = [*command, ""]
    joined = [word.partition("=") for word in words]
    return [(name, value if equals else after) for (name, equals, value), after in zip(joined, words[1:], strict=False)]


def is_longcat(model: str) -> bool:
    """Whether a directory, or a repository of the Hub in the local cache, holds a LongCat-Flash; judged by its name, if
    it has not been downloaded yet."""
    from huggingface_hub import try_to_load_from_cache

    local = Path(model, "config.json")
    try:
        cached = str(local) if Path(model).is_dir() else try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return "longcat" in model.lower()
        return member_of(json.loads(Path(cached).read_text(encoding="utf-8"))) is Member.FLASH
    except (OSError, ValueError, AttributeError):  # no file, no JSON, no object: SGLang says so itself
        return False


class _PreparesForAnEngine:
    """An importer that finds nothing, and prepares a CPU when SGLang's engine is about to be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == ENGINE_MODULE:
            sys.meta_path.remove(self)
            _prepare()


def _prepare() -> None:
    os.environ[PREPARED] = "1"
    # Without it SGLang takes no device for a CPU (srt/platforms, srt/utils/common.py `is_cpu`).
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from longcat_sglang.devices.cpu import sgl_kernel

    sys.modules["sgl_kernel"] = sgl_kernel


def bind_rank_to_its_cores() -> None:
    """Keep this rank's threads on the cores that SGLang has found for it (`SGLANG_CPU_OMP_THREADS_BIND`).

    SGLang leaves that to `sgl_kernel`. Without it every rank has a thread for every core, and ranks that wait for each
    other take the cores from each other.
    """
    from sglang.srt.runtime_context import get_device, get_parallel
    from sglang.srt.utils.numa_utils import init_threads_binding

    parallel = get_parallel()
    ranks = parallel.tp_size * (1 if parallel.enable_dp_attention else parallel.dp_size)
    if ranks == 1:
        return
    cores = read_cores(init_threads_binding(numa_index=get_device().gpu_id, world_size=ranks))
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def read_cores(text: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
