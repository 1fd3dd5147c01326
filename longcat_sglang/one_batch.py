"""SGLang's benchmark of one batch, which serves nothing and loads no plugins: with ours it measures our LongCat."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

from longcat_core.plugin.hooks import Wrapper
from longcat_sglang.devices.cpu.platform import is_longcat as names_longcat
from longcat_sglang.devices.cpu.platform import model_of
from longcat_sglang.engine import is_longcat

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

BENCHMARK = "sglang.benchmark.one_batch"


def load_plugins_for_one_batch() -> None:
    """Called while SGLang is imported: in `python -m sglang.benchmark.one_batch` of a LongCat model, and in the ranks
    that it starts, SGLang's plugins are loaded before the benchmark is. Nothing is done in any other process.

    Without it SGLang's own class would be measured, whose outputs are wrong.
    Remove when: the benchmark calls `load_plugins`, as SGLang's servers do.
    """
    if measures_longcat([*sys.orig_argv, *sys.argv]):
        sys.meta_path.insert(0, _LoadsPlugins())


def measures_longcat(command: Sequence[str]) -> bool:
    """command: words of a command line; a rank's has the benchmark's file in the place of `-m` and its name."""
    as_file = os.sep + BENCHMARK.replace(".", os.sep) + ".py"
    if not any(word == BENCHMARK or word.endswith(as_file) for word in command):
        return False
    model = model_of(command)
    return model is not None and names_longcat(model)


class _LoadsPlugins(MetaPathFinder):
    """An importer that finds nothing. Python looks for the benchmark's package when SGLang itself has been imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "sglang.benchmark" and self in sys.meta_path:
            sys.meta_path.remove(self)
            from sglang.srt.plugins import load_plugins

            load_plugins()
            TOKENS.install()


def tokens_of_the_vocabulary(
    original: Callable[..., ForwardBatch], cls: type, batch: Any, runner: Any, *args: Any, **kwargs: Any
) -> ForwardBatch:
    forward_batch = original(cls, batch, runner, *args, **kwargs)
    forward_batch.input_ids %= runner.model_config.vocab_size
    return forward_batch


def runs_longcat(_cls: Any, _batch: Any, runner: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(runner.model_config.hf_config)


TOKENS = Wrapper(
    name="tokens of the benchmark",
    target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    around="longcat_sglang.one_batch:tokens_of_the_vocabulary",
    concerns="longcat_sglang.one_batch:runs_longcat",
    why="The benchmark draws its prompts from 10,000 tokens, and ends with an IndexError for a smaller vocabulary.",
    remove_when="It draws from the model's vocabulary.",
)
"""In the benchmark's processes alone, and so not in `hooks.HOOKS`."""
