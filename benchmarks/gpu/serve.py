"""vLLM end to end, once, in this process, with random weights: the rates of decoding at some sizes, and of prefill.

    python -m benchmarks.gpu.serve DIR plugin
    python -m benchmarks.gpu.serve DIR in-tree '{"dtype": "bfloat16"}'

DIR has a config.json, the last argument is for vLLM's `LLM`. The last line of the output is the figures as JSON.
Started by the stage `vllm`.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

BATCHES = (1, 32, 96)
PROMPT, NEW = 64, 64
"""Tokens of a request."""
PREFILL = 4096
ROUNDS = 3


def main(directory: str, which: str, settings: dict[str, Any]) -> None:
    os.environ.update(VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    if which == "plugin":
        import longcat_vllm

        longcat_vllm.register()
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    batches: list[int] = settings.pop("batches", list(BATCHES))
    prefill: int = settings.pop("prefill", PREFILL)
    served = LLM(
        directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=prefill + NEW,
        max_num_batched_tokens=max(prefill, PROMPT * max(batches)),
        compilation_config={"cudagraph_capture_sizes": batches},
        **settings,
    )
    figures: dict[str, Any] = {"start_seconds": round(time.perf_counter() - started, 1)}

    def seconds(requests: int, prompt: int, new: int) -> float:
        """The best of some rounds, so that compilation and graphs are not in it."""
        prompts = [{"prompt_token_ids": [(7 + 31 * i + j) % 500 for j in range(prompt)]} for i in range(requests)]
        sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
        times = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            served.generate(prompts, sampling, use_tqdm=False)
            times.append(time.perf_counter() - begun)
        return min(times)

    figures["decode_tokens_per_second"] = {
        str(n): round(n * NEW / (seconds(n, PROMPT, NEW + 1) - seconds(n, PROMPT, 1)), 1) for n in batches
    }
    figures["prefill_tokens_per_second"] = round(prefill / seconds(1, prefill, 1), 1)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]) if sys.argv[3:] else {})
