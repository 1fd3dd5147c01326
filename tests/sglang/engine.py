"""An SGLang engine that is asked for tokens and logits, over token ids.

SGLang runs in processes of its own, which take 10 s to import it. Here they are forked from a server that has done so,
which takes less than one.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sglang.srt.entrypoints import engine as entry  # as a process that runs an engine: ours prepares a CPU then
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.drafting.gate import Step
from longcat_sglang.engine import SGLANG
from tests.collectives import note
from tests.metrics import Metrics
from tests.speculation import Speculated, accepted_by_position

if TYPE_CHECKING:
    from tests.server import Server

NAME, PACKAGE, RECORD = "SGLang", "longcat_sglang", SGLANG
UNSUPPORTED, SUPPORTED = ("0.5.20", "0.5.22", "0.6.0"), ("0.5.21", "0.5.21.post1")
STARTED = "Load weight begin"
"""In the log of a server whose engine's processes have started."""
METRICS = Metrics(
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    generated='sglang:realtime_tokens_total{mode="decode"}',
    preemptions="sglang:num_retracted_requests_total",
    pruned="sglang:spec_num_drafts_pruned_total",
    verifications="sglang:spec_verify_calls_total",
)
METRIC_LABELS: dict[str, str] = {}
"""What every metric of an engine is labelled with, beside the model's name."""
STEPS_BEHIND_THE_END = 1
"""Of an answer that ends by its length: tokens whose successor is computed and thrown away, as steps overlap."""
AS_THE_STOCK_COMMAND: dict[str, Any] = {}
"""Engine arguments: the tests' engines are as it is."""
OURS: dict[str, str] = {}
"""Variables that the tests set for engines of their own, and a user would not."""
FP8_CACHE = "fp8_e4m3"
"""What `kv_cache_dtype` is for a cache in FP8 (e4m3)."""
PRELOADED = ["sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager", "sglang.srt.models.registry"]
Break = Callable[[pytest.MonkeyPatch], None]


class Engine:
    def __init__(self, engine: Any) -> None:
        self.sglang = engine
        self.cached_tokens = 0
        """Prompt tokens that were found in the prefix cache so far."""
        self.preemptions = 0
        """Requests that lost their place in the cache so far."""

    def greedy(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        return [output["output_ids"] for output in self.outputs(prompts, new_tokens)]

    def outputs(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        temperatures: Sequence[float] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        parameters = [
            {"temperature": temperature, "max_new_tokens": new_tokens, "ignore_eos": True}
            for temperature in temperatures or [0] * len(prompts)
        ]
        outputs = list(
            self.sglang.generate(input_ids=[list(p) for p in prompts], sampling_params=parameters, **options)
        )
        ended = [output["meta_info"] for output in outputs if output["meta_info"]["finish_reason"]]
        self.cached_tokens += sum(about["cached_tokens"] for about in ended)
        self.preemptions += sum(about.get("num_retractions", 0) for about in ended)
        return outputs

    def speculated(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Speculated]:
        """Greedy, all at once. The last verification counts what was asked for and no more.

        Taken from what the engine's processes send, which is one message a step: a stream joins those that wait. A
        request that loses its place in the cache gets its next token from a prompt, which looks like a verification.
        """
        manager = self.sglang.tokenizer_manager
        steps: dict[str, list[list[int]]] = {str(number): [] for number in range(len(prompts))}

        async def noting(message: Any) -> None:
            for request, tokens in zip(message.rids, message.output_ids, strict=True):
                steps[request].append(list(tokens))
            await handle(message)

        handle = manager._handle_batch_output
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manager, "_handle_batch_output", noting)
            self.outputs(prompts, new_tokens, rid=list(steps), stream=True)
        return [
            Speculated([token for step in taken for token in step], [len(step) - 1 for step in taken[1:]])
            for taken in steps.values()
        ]

    def sampled(self, prompt: list[int], new_tokens: int, temperatures: Sequence[float]) -> list[list[int]]:
        """One continuation for each temperature, all at once; SGLang draws them one after the other from its seed."""
        outputs = self.outputs([prompt for _ in temperatures], new_tokens, temperatures)
        return [output["output_ids"] for output in outputs]

    def largest_chunk(self) -> int:
        """Tokens of a prompt in a step, at most."""
        return self.sglang.server_args.resolved_dict()["chunked_prefill_size"]

    def update(self, tensors: dict[str, Tensor]) -> None:
        """Load these into the running model."""
        succeeded, message = self._update(tensors)
        assert succeeded, message

    def refused_update(self, tensors: dict[str, Tensor]) -> str:
        """Why these are not loaded into the running model."""
        succeeded, message = self._update(tensors)
        assert not succeeded
        return message

    def turn_dial(self, ffn_experts: float) -> None:
        """Give the dial another target."""
        self._set(longcat_ffn_experts=ffn_experts)

    def reset_dial(self) -> None:
        self._set(longcat_reset_dial=1)

    def _set(self, **state: float) -> None:
        from sglang.srt.managers.io_struct import SetInternalStateReq

        manager = self.sglang.tokenizer_manager
        request = SetInternalStateReq(server_args=state)
        assert self.sglang.loop.run_until_complete(manager.set_internal_state(request)) == [True]

    def _update(self, tensors: dict[str, Tensor]) -> tuple[bool, str]:
        self.sglang.begin_weight_update()
        try:
            succeeded, message = self.sglang.update_weights_from_tensor(list(tensors.items()))
        finally:
            self.sglang.end_weight_update()
        return succeeded, message

    def log_softmax(self, prompt: list[int], vocab_size: int) -> Tensor:
        """fp32 [len(prompt) - 1, vocabulary]: of the logits at every position that has a successor in the prompt."""
        asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": vocab_size}
        (output,) = self.outputs([prompt], 1, **asked)
        return _rows(output["meta_info"]["input_top_logprobs"][1:], vocab_size)

    def greedy_log_softmax(self, prompts: Sequence[list[int]], new_tokens: int, vocab_size: int) -> list[Tensor]:
        """Of the logits from which each new token was chosen, all prompts at once: fp32 [new_tokens, vocabulary]."""
        outputs = self.outputs(prompts, new_tokens, return_logprob=True, top_logprobs_num=vocab_size)
        return [_rows(output["meta_info"]["output_top_logprobs"], vocab_size) for output in outputs]


def _rows(positions: Sequence[Sequence[tuple[float, int, Any]]], vocab_size: int) -> Tensor:
    rows = torch.empty(len(positions), vocab_size)
    for row, position in zip(rows, positions, strict=True):
        for logprob, token, _ in position:
            row[token] = logprob
    return rows


def speculation(draft_tokens: int) -> dict[str, Any]:
    """Engine arguments: so many drafts a step, one after the other."""
    return {
        "speculative_algorithm": "NEXTN",
        "speculative_num_steps": draft_tokens,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": draft_tokens + 1,
    }


GATED: dict[str, Any] = {"json_model_override_args": '{"longcat_draft_gate": true}'}
"""Engine arguments: ask for the checkpoint's draft gate."""
GATED_FLAGS = ["--json-model-override-args", GATED["json_model_override_args"]]
"""What a user types for that."""


def held_at(ffn_experts: Any, **more: Any) -> dict[str, Any]:
    """Engine arguments: hold the mean of FFN experts a token, or between two bounds. more: other options of ours."""
    ours = {f"longcat_{name}": value for name, value in {"ffn_experts": ffn_experts, **more}.items()}
    return {"json_model_override_args": json.dumps(ours)}


def dial_flags(ffn_experts: Any, **more: Any) -> list[str]:
    """What a user types for that."""
    return ["--json-model-override-args", held_at(ffn_experts, **more)["json_model_override_args"]]


def target_of(answer: dict[str, Any]) -> float:
    """The dial's target that an answer names."""
    return float(answer["metadata"]["ffn_experts"])


OWN_STREAMS: dict[str, dict[str, Any]] = {"/generate": {"text": "def ", "sampling_params": {"max_new_tokens": 4}}}
"""Requests whose answers can come in a stream, by the routes that only this engine has."""
TARGET_IN_A_RESPONSE = '"ffn_experts"'
MOST_RUNNING = "--max-running-requests"
"""The flag for how many requests run at once."""


ADMIN_ENVIRONMENT: dict[str, str] = {}
"""With which a server has the routes of its administrator."""


def turn_dial(server: Server, ffn_experts: Any) -> str:
    """Give a server's dial another target; what it says against that, which is in its log or its answer."""
    names = ("longcat_ffn_experts", "longcat_least_ffn_experts")
    bounds = sorted(ffn_experts, reverse=True) if isinstance(ffn_experts, list) else [ffn_experts]
    return _set(server, **dict(zip(names, bounds, strict=False)))


def reset_dial(server: Server) -> None:
    assert not _set(server, longcat_reset_dial=1)


def _set(server: Server, **state: Any) -> str:
    answer = server.http.post("/set_internal_state", json={"server_args": state})
    if answer.is_client_error:
        return answer.text
    if answer.raise_for_status().json() == [True]:
        return ""
    return server.log.read_text().rpartition("/set_internal_state: ")[2]


OWN_DRAFT_TOKENS = 3
"""What SGLang drafts in a step if it is not told."""


def speculation_flags(draft_tokens: int) -> list[str]:
    """What a user types for that."""
    number = [] if draft_tokens == OWN_DRAFT_TOKENS else ["--speculative-num-steps", str(draft_tokens)]
    return ["--speculative-algorithm", "NEXTN", *number]


def expert_parallel_flags(ranks: int) -> list[str]:
    """What a user types for FFN experts that are spread over ranks."""
    return ["--tp-size", str(ranks), "--ep-size", str(ranks)]


SAYS_THAT_RANK_1_DIED = " by peer"
"""Said by the others: SGLang names no rank that was killed."""


def placed(file: Path, redundant: int) -> dict[str, Any]:
    """Engine arguments: where experts are, as a file says, so many redundant ones among them."""
    return {"init_expert_location": str(file), "ep_num_redundant_experts": redundant}


def environment_of_ranks(ranks: int) -> dict[str, str]:
    """SGLang wants to be told each rank's cores, and these machines may have few."""
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {"SGLANG_CPU_OMP_THREADS_BIND": bound} if ranks > 1 else {}


PARSER_FLAGS = ["--tool-call-parser", "longcat", "--reasoning-parser", "longcat"]
DRAFTS_BEHIND_THE_END = True
"""Whether `usage` counts them as reasoning (docs/upstream.md, 40)."""


def matching(regex: str) -> dict[str, Any]:
    """Parameters of a request whose answer is to match, reasoning aside."""
    return {"regex": regex}


def speculation_metrics(steps: Sequence[Step]) -> dict[str, float]:
    """What the server has to count for these verifications."""
    return {"sglang:spec_verify_calls_total": len(steps)}


def acceptance_metrics(steps: Sequence[Step], draft_tokens: int) -> dict[str, float]:
    """What it has to count for them by position, of so many drafts each at most."""
    return {"longcat:verified_chains_total": len(steps)} | {
        f'longcat:accepted_drafts_total{{position="{position}"}}': accepted
        for position, accepted in enumerate(accepted_by_position(steps, draft_tokens))
    }


def _note_collectives(file: Path, patch: pytest.MonkeyPatch) -> None:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.layernorm import RMSNorm

    from longcat_sglang.model import LongcatModel

    note(file, GroupCoordinator, LongcatModel, RMSNorm, patch)


def noting_collectives(file: Path) -> dict[str, Any]:
    """Engine arguments: note each rank's forward passes in a file, as `tests/collectives.py` does."""
    return {"broken": partial(_note_collectives, file)}


def in_each_rank(change: Break) -> dict[str, Any]:
    """Engine arguments: change something in the process of every rank."""
    return {"broken": change}


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
    from sglang.srt.utils import kill_process_tree

    options: dict[str, Any] = {
        "model_path": str(directory),
        "dtype": dtype,
        "chunked_prefill_size": chunk,
        "disable_radix_cache": not prefix_caching,
        "page_size": block_size,
        "max_total_tokens": cache_tokens or 4096,
        "context_length": max_model_len,
        "max_running_requests": max_running,
        "tp_size": tensor_parallel,
        "ep_size": tensor_parallel if expert_parallel else 1,
        "skip_tokenizer_init": True,
        "mem_fraction_static": 0.1,
        "random_seed": 0,
        "log_level": "error",
        "custom_sigquit_handler": leave_it_to_the_pipe,
        **(speculation(draft_tokens) if draft_tokens else {}),
    }
    if cache_tokens is not None:
        options["schedule_conservativeness"] = 0.01  # so that requests are let in that will not fit to their end
    environment = environment_of_ranks(tensor_parallel)

    class ForkedEngine(entry.Engine):
        run_scheduler_process_func = staticmethod(partial(_run_scheduler, environment, broken))

    with pytest.MonkeyPatch.context() as patch:
        start = multiprocessing.set_start_method
        multiprocessing.set_forkserver_preload(PRELOADED)
        patch.setattr(multiprocessing, "set_start_method", lambda method, force: start("forkserver", force=True))
        engine = ForkedEngine(**{name: value for name, value in (options | engine_args).items() if value is not None})
    try:
        with _death_of_a_process_is_an_error(engine):
            yield Engine(engine)
    finally:
        engine.tokenizer_manager._subprocess_watchdog.stop()
        for process in engine.get_all_child_pids():
            kill_process_tree(process, wait_timeout=60)


def leave_it_to_the_pipe(number: int, frame: object) -> None:
    """SIGQUIT while an engine starts. SGLang's own handler kills the tests. If a process of the engine died, its end of
    a pipe closes, which is an error where the engine waits for it."""


@contextmanager
def _death_of_a_process_is_an_error(engine: Any) -> Iterator[None]:
    """When a process of the engine dies, SGLang's watchdog sends SIGQUIT, and its handler would kill the tests too.
    Here it stops the event loop, which is a RuntimeError where an answer is waited for."""
    from sglang.srt.managers.tokenizer_manager import SignalHandler

    def stop(*_: object) -> None:
        engine.loop.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SignalHandler, "running_phase_sigquit_handler", stop)
        yield


def _run_scheduler(environment: dict[str, str], broken: Break | None, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    os.environ.update(environment)
    if broken is not None:
        load_plugins()
        broken(pytest.MonkeyPatch())
    run_scheduler_process(*args, **kwargs)


def command(
    directory: Path, *, served_name: str | None = None, max_model_len: int = 256, cache_tokens: int = 4096
) -> list[str | Path]:
    """The stock command, in fp32, with metrics of every step."""
    arguments = {
        "--dtype": "float32",
        "--context-length": str(max_model_len),
        "--max-total-tokens": str(cache_tokens),
        "--mem-fraction-static": "0.1",
        "--schedule-conservativeness": "0.1",
        "--decode-log-interval": "1",
    }
    if served_name is not None:
        arguments["--served-model-name"] = served_name
    flat = [word for argument in arguments.items() for word in argument]
    return [*stock_command(directory), "--enable-metrics", *flat]


def stock_command(directory: Path) -> list[str | Path]:
    """What a user types."""
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", directory]


def configure(directory: Path, **engine_args: Any) -> LongcatConfig | None:
    """What `sglang.launch_server` does before it starts any process: the model as read, None if it is not LongCat."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(_resolved(directory, engine_args))
    longcat: LongcatConfig | None = getattr(model.hf_config, "longcat", None)
    if longcat is not None:
        assert (model.num_hidden_layers, model.num_attention_layers) == (longcat.num_layers, 2 * longcat.num_layers)
        assert model.kv_lora_rank + model.qk_rope_head_dim == longcat.latent_dim
        assert model.scaling == pytest.approx(longcat.softmax_scale), "what some MLA backends take"
    return longcat


def settled(directory: Path, **engine_args: Any) -> dict[str, Any]:
    """All engine arguments, as they are when `sglang.launch_server` has made up its mind."""
    return _resolved(directory, engine_args).resolved_dict()


def _resolved(directory: Path, engine_args: dict[str, Any]) -> Any:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    server_args = ServerArgs(model_path=str(directory), skip_tokenizer_init=True, **engine_args)
    server_args.resolve_once()
    return server_args
