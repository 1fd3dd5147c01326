"""A vLLM engine that is asked for tokens and logits, over token ids."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import atexit
import gc
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.drafting.gate import Step
from longcat_vllm.engine import VLLM
from tests.cases import DEFAULT
from tests.metrics import Metrics
from tests.speculation import Speculated, accepted_by_position

if TYPE_CHECKING:
    from tests.server import Server

# Engines in this process take 2 s each; one of processes of its own takes 20.
OURS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
os.environ.update(OURS)

NAME, PACKAGE, RECORD = "vLLM", "longcat_vllm", VLLM
UNSUPPORTED, SUPPORTED = ("0.26.0", "0.31.2", "0.34.0"), ("0.32.0+cpu", "0.32.1", "0.33.0rc1")
AS_THE_STOCK_COMMAND = {"enforce_eager": False}
"""Engine arguments: the tests' engines are eager, to start sooner."""
FP8_CACHE = "fp8"
"""What `kv_cache_dtype` is for a cache in FP8 (e4m3)."""
STARTED = "EngineCore"
"""In the log of a server whose engine's processes have started."""
METRICS = Metrics(
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    generated="vllm:generation_tokens_total",
    preemptions="vllm:num_preemptions_total",
    pruned="vllm:spec_decode_num_draft_tokens_pruned_total",
    verifications="vllm:spec_decode_num_drafts_total",
)
METRIC_LABELS = {"engine": "0"}
"""What every metric of an engine is labelled with, beside the model's name."""
STEPS_BEHIND_THE_END = 0
"""Of an answer that ends by its length: tokens whose successor is computed and thrown away."""
Break = Callable[[pytest.MonkeyPatch], None]


class Engine:
    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def greedy(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts, new_tokens)]

    def outputs(self, prompts: Sequence[list[int]], new_tokens: int, **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **sampling)
        return self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)

    def speculated(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Speculated]:
        """Greedy, all at once. The last verification counts what was asked for and no more."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine = self.llm.llm_engine
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, parameters)
        steps: dict[str, list[list[int]]] = {str(number): [] for number in range(len(prompts))}
        while engine.has_unfinished_requests():
            for output in engine.step():
                steps[output.request_id].append(list(output.outputs[0].token_ids))
        return [
            Speculated([token for step in taken for token in step], [len(step) - 1 for step in taken[1:]])
            for taken in steps.values()
        ]

    def sampled(self, prompt: list[int], new_tokens: int, temperatures: Sequence[float]) -> list[list[int]]:
        """One continuation for each temperature, all at once, each with a seed of its own."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(temperature=temperature, seed=seed, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            for seed, temperature in enumerate(temperatures)
        ]
        prompts = [{"prompt_token_ids": prompt}] * len(parameters)
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(prompts, parameters, use_tqdm=False)]

    def log_softmax(self, prompt: list[int], vocab_size: int) -> Tensor:
        """fp32 [len(prompt) - 1, vocabulary]: of the logits at every position that has a successor in the prompt."""
        (output,) = self.outputs([prompt], 1, prompt_logprobs=-1)
        rows = [[position[token].logprob for token in range(vocab_size)] for position in output.prompt_logprobs[1:]]
        return torch.tensor(rows)

    def greedy_log_softmax(self, prompts: Sequence[list[int]], new_tokens: int, vocab_size: int) -> list[Tensor]:
        """Of the logits from which each new token was chosen, all prompts at once: fp32 [new_tokens, vocabulary]."""
        return [
            torch.tensor([[step[token].logprob for token in range(vocab_size)] for step in output.outputs[0].logprobs])
            for output in self.outputs(prompts, new_tokens, logprobs=-1)
        ]

    def largest_chunk(self) -> int:
        """Tokens of a step, at most."""
        scheduler = self.llm.llm_engine.vllm_config.scheduler_config
        assert scheduler.enable_chunked_prefill
        return scheduler.max_num_batched_tokens

    @property
    def cached_tokens(self) -> float:
        """Prompt tokens that were found in the prefix cache so far."""
        return self._metric("vllm:prefix_cache_hits")

    @property
    def preemptions(self) -> float:
        """Requests that lost their place in the cache so far."""
        return self._metric("vllm:num_preemptions")

    def update(self, tensors: dict[str, Tensor]) -> None:
        """Load these into the running model."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors.items()})

    def turn_dial(self, ffn_experts: float) -> None:
        """Give the dial another target."""
        said = self.llm.collective_rpc("set_ffn_experts", args=(ffn_experts,))
        assert said == [{"ffn_experts": ffn_experts}] * len(said)

    def reset_dial(self) -> None:
        self.llm.collective_rpc("reset_dial")

    @property
    def model(self) -> torch.nn.Module:
        """The model itself, where the engine runs in this process."""
        return self.llm.llm_engine.model_executor.driver_worker.get_model()

    def _metric(self, name: str) -> float:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)


def speculation(draft_tokens: int) -> dict[str, Any]:
    """Engine arguments: so many drafts a step."""
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": draft_tokens}}


GATED: dict[str, Any] = {"additional_config": {"longcat": {"draft_gate": True}}}
"""Engine arguments: ask for the checkpoint's draft gate."""
GATED_FLAGS = ["--additional-config", json.dumps(GATED["additional_config"])]
"""What a user types for that."""


def held_at(ffn_experts: Any, **more: Any) -> dict[str, Any]:
    """Engine arguments: hold the mean of FFN experts a token, or between two bounds. more: other options of ours."""
    return {"additional_config": {"longcat": {"ffn_experts": ffn_experts, **more}}}


def dial_flags(ffn_experts: Any, **more: Any) -> list[str]:
    """What a user types for that."""
    return ["--additional-config", json.dumps(held_at(ffn_experts, **more)["additional_config"])]


def target_of(answer: dict[str, Any]) -> float:
    """The dial's target that an answer names."""
    return float(answer["system_fingerprint"].rpartition("-ffn")[2])


OWN_STREAMS: dict[str, dict[str, Any]] = {}
"""Requests whose answers can come in a stream, by the routes that only this engine has."""
TARGET_IN_A_RESPONSE = '-ffn{}"'
MOST_RUNNING = "--max-num-seqs"
"""The flag for how many requests run at once."""


ADMIN_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""With which a server has the routes of its administrator."""


def turn_dial(server: Server, ffn_experts: Any) -> str:
    """Give a server's dial another target; what it says against that."""
    targets = ffn_experts if isinstance(ffn_experts, list) else [ffn_experts]
    (said,) = {answer.get("error", "") for answer in _call_workers(server, "set_ffn_experts", *targets)}
    return said


def reset_dial(server: Server) -> None:
    _call_workers(server, "reset_dial")


def _call_workers(server: Server, method: str, *arguments: Any) -> list[dict[str, Any]]:
    answer = server.http.post("/collective_rpc", json={"method": method, "args": arguments})
    return answer.raise_for_status().json()["results"]


def speculation_flags(draft_tokens: int) -> list[str]:
    """What a user types for that."""
    return ["--speculative-config", json.dumps(speculation(draft_tokens)["speculative_config"])]


def expert_parallel_flags(ranks: int) -> list[str]:
    """What a user types for FFN experts that are spread over ranks, here with two servers of the API."""
    return ["--tensor-parallel-size", str(ranks), "--enable-expert-parallel", "--api-server-count", "2"]


SAYS_THAT_RANK_1_DIED = "Worker proc VllmWorker-1 died unexpectedly"


def placed(file: Path, redundant: int) -> dict[str, Any]:
    """Engine arguments: where experts are, as a file says, in which redundant ones are seen."""
    return {"additional_config": {"longcat": {"init_expert_location": str(file)}}}


def environment_of_ranks(ranks: int) -> dict[str, str]:
    """vLLM binds each rank to cores of its own, and refuses when there are not enough."""
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if ranks > 1 else {}


PARSER_FLAGS = ["--enable-auto-tool-choice", "--tool-call-parser", "longcat", "--reasoning-parser", "longcat"]
DRAFTS_BEHIND_THE_END = False


def matching(regex: str) -> dict[str, Any]:
    """Parameters of a request whose answer is to match, reasoning aside."""
    return {"structured_outputs": {"regex": regex}}


def speculation_metrics(steps: Sequence[Step]) -> dict[str, float]:
    """What the server has to count for these verifications."""
    return {
        "vllm:spec_decode_num_drafts_total": len(steps),
        "vllm:spec_decode_num_draft_tokens_total": sum(step.verified for step in steps),
        "vllm:spec_decode_num_accepted_tokens_total": sum(step.accepted for step in steps),
    }


def acceptance_metrics(steps: Sequence[Step], draft_tokens: int) -> dict[str, float]:
    """What it has to count for them by position, of so many drafts each at most."""
    return {
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{position}"}}': accepted
        for position, accepted in enumerate(accepted_by_position(steps, draft_tokens))
    }


def noting_collectives(file: Path) -> dict[str, Any]:
    """Engine arguments: note each rank's forward passes in a file, as `tests/collectives.py` does."""

    def name_the_file(patch: pytest.MonkeyPatch) -> None:
        patch.setenv("LONGCAT_TEST_COLLECTIVES", str(file))

    return {"worker_extension_cls": "tests.vllm.noted_collectives.NotedCollectives", "broken": name_the_file}


def in_each_rank(change: Break) -> dict[str, Any]:
    """Engine arguments: change something in the process of every rank; it has to be a function of a module, or a part
    of one."""

    def hand_over(patch: pytest.MonkeyPatch) -> None:
        patch.setenv("LONGCAT_TEST_CHANGE", pickle.dumps(change).hex())

    return {"worker_extension_cls": "tests.vllm.changed_rank.ChangedRank", "broken": hand_over}


@contextmanager
def serving(
    directory: Path,
    *,
    dtype: str = "float32",
    chunk: int | None = None,
    prefix_caching: bool = True,
    block_size: int | None = None,
    cache_tokens: int | None = None,
    max_model_len: int | None = None,
    max_running: int | None = None,
    tensor_parallel: int = 1,
    expert_parallel: bool = False,
    draft_tokens: int | None = None,
    broken: Break | None = None,
    **engine_args: Any,
) -> Iterator[Engine]:
    """An engine that is gone afterwards. `chunk`: tokens of a prompt at once; `broken`: what to do to it first;
    `draft_tokens`: speculate with so many a step."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype,
        "max_num_batched_tokens": chunk,
        "enable_prefix_caching": prefix_caching,
        "block_size": block_size,
        "num_gpu_blocks_override": cache_tokens and cache_tokens // (block_size or 16),
        "max_num_seqs": max_running,
        "tensor_parallel_size": tensor_parallel,
        "enable_expert_parallel": expert_parallel,
        # vLLM wants room for one whole request and a block.
        "max_model_len": max_model_len or min(256, (cache_tokens or 512) - 16),
        "enforce_eager": True,
        "kv_cache_memory_bytes": 32 << 20,
        "skip_tokenizer_init": True,
        "max_logprobs": -1,
        **(speculation(draft_tokens) if draft_tokens else {}),
        "disable_log_stats": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_of_ranks(tensor_parallel * engine_args.get("pipeline_parallel_size", 1)).items():
            patch.setenv(name, value)
        if broken is not None:
            broken(patch)
        # An engine looks for garbage ten times, each time among all that was ever imported: 0.2 s that are no test.
        # What there is now is left out; vLLM would let it in again. At exit it is garbage like any other.
        gc.freeze()
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        llm = None
        try:
            llm = LLM(**{name: value for name, value in (options | engine_args).items() if value is not None})
            yield Engine(llm)
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def command(
    directory: Path, *, served_name: str | None = None, max_model_len: int = 256, cache_tokens: int = 4096
) -> list[str | Path]:
    """The stock command, in fp32, with a cache of so many tokens of the default case."""
    bytes_per_token = DEFAULT.kv_cache_bytes_per_token(itemsize=4)
    arguments = {
        "--dtype": "float32",
        "--max-model-len": str(max_model_len),
        "--block-size": "16",
        "--kv-cache-memory-bytes": str(cache_tokens * bytes_per_token),
    }
    if served_name is not None:
        arguments["--served-model-name"] = served_name
    flat = [word for argument in arguments.items() for word in argument]
    return [*stock_command(directory), "--enforce-eager", *flat]


def stock_command(directory: Path) -> list[str | Path]:
    """What a user types."""
    return [Path(sys.executable).with_name("vllm"), "serve", directory]


def configure(directory: Path, **engine_args: Any) -> LongcatConfig | None:
    """What `vllm serve` does before it starts any process: the model as read, None if it is not LongCat."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.MonkeyPatch.context() as patch:  # so as not to wait two seconds to read a bad config again
        patch.setattr("vllm.transformers_utils.repo_utils.time", SimpleNamespace(sleep=lambda seconds: None))
        config = EngineArgs(str(directory), skip_tokenizer_init=True, **engine_args).create_engine_config()
    model = config.model_config
    if model.architecture != "LongcatFlashForCausalLM":
        return None
    longcat = spellings.read(model.hf_config)
    assert model.get_total_num_hidden_layers() == longcat.num_layers
    assert model.get_head_size() == longcat.latent_dim
    return longcat
