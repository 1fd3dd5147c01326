"""Decode steps of one request by mlx-lm, in fp32, for `bench_floor --mlx-lm`, which starts this in another environment.

Arguments: a checkpoint, tokens of the prompt, steps before those that are timed, and steps. Prints the seconds of a
step, the median.
"""
# SPDX-License-Identifier: Apache-2.0

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main(checkpoint: Path, prompt_tokens: int, warm_up: int, steps: int) -> None:
    # Which the published config.json have, and those of this project's own models do not.
    model: Any
    model, _ = load_model(checkpoint, model_config={"model_type": "longcat_flash", "attention_method": "MLA"})
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    cache: Any = make_prompt_cache(model)
    mx.random.seed(0)
    token = chosen(model(mx.random.randint(5, model.args.vocab_size, (1, prompt_tokens)), cache=cache))
    times = []
    for _ in range(warm_up + steps):
        started = time.perf_counter()
        token = chosen(model(token[:, None], cache=cache))
        times.append(time.perf_counter() - started)
    print(statistics.median(times[warm_up:]))


def chosen(logits: Any) -> Any:
    token = mx.argmax(logits[:, -1], axis=-1)
    mx.eval(token)
    return token


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
