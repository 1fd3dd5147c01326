"""Each of vLLM's options that was tried has the outcome that its row says."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_core.plugin.options import Outcome
from longcat_vllm.options import OPTIONS
from tests.cases import Case
from tests.engines.test_bad_checkpoints import CASE
from tests.vllm.engine import configure, speculation

NGRAM = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
CONNECTOR = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
KEPT: dict[str, tuple[list[str], str, Any]] = {
    "--load-format auto": (["--load-format", "auto"], "load_config.load_format", "auto"),
    "--load-format dummy": (["--load-format", "dummy"], "load_config.load_format", "dummy"),
    "--enable-ep-weight-filter": (["--enable-ep-weight-filter"], "parallel_config.enable_ep_weight_filter", True),
    "--enable-lora": (["--enable-lora"], "lora_config.max_loras", 1),
    "--enable-expert-parallel": (["--enable-expert-parallel"], "parallel_config.enable_expert_parallel", True),
    "--speculative-config ngram": (["--speculative-config", NGRAM], "speculative_config.method", "ngram"),
    "--enable-prefix-caching": (["--enable-prefix-caching"], "cache_config.enable_prefix_caching", True),
    "--enable-chunked-prefill": (["--enable-chunked-prefill"], "scheduler_config.enable_chunked_prefill", True),
    "--prefix-caching-hash-algo": (
        ["--prefix-caching-hash-algo", "xxhash"],
        "cache_config.prefix_caching_hash_algo",
        "xxhash",
    ),
    "--kv-transfer-config": (
        ["--kv-transfer-config", CONNECTOR],
        "kv_transfer_config.kv_connector",
        "ExampleConnector",
    ),
    "--tensor-parallel-size": (["--tensor-parallel-size", "2"], "parallel_config.tensor_parallel_size", 2),
    "--enforce-eager": (["--enforce-eager"], "model_config.enforce_eager", True),
    "-O": (["-O", "0"], "optimization_level.value", 0),
    "--enable-prompt-embeds": (["--enable-prompt-embeds"], "model_config.enable_prompt_embeds", True),
    "--scheduling-policy": (["--scheduling-policy", "priority"], "scheduler_config.policy", "priority"),
}
"""What is typed for each option that was run on a CPU, and what vLLM's configuration has to have then."""


def settled(directory: Path, typed: list[str]) -> Any:
    """vLLM's configuration, as its command line makes it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--model", str(directory), "--skip-tokenizer-init", *typed])
    return EngineArgs.from_cli_args(given).create_engine_config()


def test_each_option_that_was_run_on_a_cpu_is_looked_at() -> None:
    """But for longcat-serving's own, which have tests of their own."""
    served = {option for option in OPTIONS if option.outcome is Outcome.SERVED and "run on a CPU" in option.known_by}
    assert {option.flag for option in served if "longcat" not in option.flag} == KEPT.keys()


@pytest.mark.parametrize("flag", KEPT)
def test_an_option_that_was_run_on_a_cpu_is_not_turned_off_there(
    flag: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    """By vLLM's CPU platform, which has the last word: a run would show nothing of it."""
    typed, field, wanted = KEPT[flag]
    assert attrgetter(field)(settled(checkpoint_of(CASE), typed)) == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_vllm_still_turns_asynchronous_scheduling_off_on_a_cpu(checkpoint_of: Callable[[Case], Path]) -> None:
    """If this fails, the row of --async-scheduling can be tried."""
    assert not settled(checkpoint_of(CASE), ["--async-scheduling"]).scheduler_config.async_scheduling


WITH_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "--quantization": {"quantization": None},
    "--convert": {"convert": "none"},
    "--lora-target-modules": {"enable_lora": True, "lora_target_modules": ["o_proj"]},
    "--moe-backend": {"moe_backend": "triton"},
    "--all2all-backend": {"all2all_backend": "allgather_reducescatter"},
    "--worker-cls": {"worker_cls": "auto"},
    "--speculative-config": speculation(2),
    "--kv-cache-dtype": {"kv_cache_dtype": "auto"},
    "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
    "--data-parallel-size": {"data_parallel_size": 2, "enable_expert_parallel": True},
}
"""Of each such row, what is served."""


@pytest.mark.parametrize("flag", WITH_EXCEPTIONS)
def test_an_option_with_exceptions_is_served_without(flag: str, checkpoint_of: Callable[[Case], Path]) -> None:
    """The exceptions are in `test_bad_deployments.py`, and with a saved state it is in `test_loading.py`."""
    rows = {option.flag for option in OPTIONS if option.outcome is Outcome.WITH_EXCEPTIONS}
    assert rows == {*WITH_EXCEPTIONS, "--load-format sharded_state"}
    assert configure(checkpoint_of(CASE), **WITH_EXCEPTIONS[flag]) == CASE.config
