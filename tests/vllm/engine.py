"""A vLLM engine that is asked for tokens and logits, over token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Engine:
    def __init__(self, directory: Path, **engine_args: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 32 << 20,
            "skip_tokenizer_init": True,
            "max_logprobs": -1,
            "disable_log_stats": False,
        }
        self.llm = LLM(str(directory), **(defaults | engine_args))

    def greedy(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts, new_tokens)]

    def outputs(self, prompts: Sequence[list[int]], new_tokens: int, **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **sampling)
        return self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)

    def log_softmax(self, prompt: list[int], vocab_size: int) -> Tensor:
        """fp32 [len(prompt) - 1, vocabulary]: of the logits at every position that has a successor in the prompt."""
        (output,) = self.outputs([prompt], 1, prompt_logprobs=-1)
        rows = [[position[token].logprob for token in range(vocab_size)] for position in output.prompt_logprobs[1:]]
        return torch.tensor(rows)

    def metric(self, name: str) -> float:
        """The sum of a counter over its labels."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    @property
    def model(self) -> torch.nn.Module:
        """The model itself, where the engine runs in this process."""
        return self.llm.llm_engine.model_executor.driver_worker.get_model()


@contextmanager
def serving(directory: Path, **engine_args: Any) -> Iterator[Engine]:
    """An engine that is gone afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = Engine(directory, **engine_args)
    try:
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
