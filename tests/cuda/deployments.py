"""The deployments of the suite: models of published sizes, machines, the engine's options."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longcat_core.planning.dry_run import Request
from tests.cases import CHAT

LAYERS = 28
BLOCKS_OF_SMALL_MODELS = 4096
"""Of the cache. vLLM has an object for each, and where a few layers leave 130 GB to it they take seconds to make."""
LITE_TRUNK = CHAT | {
    "hidden_size": 3072,
    "num_layers": 14,
    "num_attention_heads": 32,
    "ffn_hidden_size": 6144,
    "expert_ffn_hidden_size": 1024,
    "n_routed_experts": 256,
    "zero_expert_num": 128,
}
"""LongCat-Flash-Lite's sizes, without its n-gram embeddings, with which it is the engine's own class."""
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
MODELS: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "chat-fp8": CHAT | {"quantization_config": BLOCKS},
    "chat-4-layers": CHAT | {"num_layers": 4},
    "chat-fp8-4-layers": CHAT | {"num_layers": 4, "quantization_config": BLOCKS},
    "lite-trunk": LITE_TRUNK,
}


def write_models(directory: Path) -> None:
    """A directory with a `config.json` for each model."""
    for name, raw in MODELS.items():
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))


@dataclass(frozen=True)
class Deployment:
    machine: str
    model: str
    options: str
    v2_model_runner: bool = True
    is_traced: bool = False
    rank: int = 0
    package: str = "longcat_vllm"

    def request(self, models: Path) -> Request:
        given = ["--context-length", "16384"] if self.package == "longcat_sglang" else ["--max-model-len", "16384"]
        if self.package == "longcat_vllm" and MODELS[self.model]["num_layers"] < LAYERS:
            given += ["--num-gpu-blocks-override", str(BLOCKS_OF_SMALL_MODELS)]
        return Request(
            model=str(models / self.model),
            options=(*self.options.split(), *given),
            environment=(("VLLM_USE_V2_MODEL_RUNNER", str(int(self.v2_model_runner))),),
            rank=self.rank,
            is_traced=self.is_traced,
        )


def drafts(number: int) -> str:
    return f'--speculative-config {{"method":"mtp","num_speculative_tokens":{number}}}'


TP8 = "--tensor-parallel-size 8"
EP8 = f"{TP8} --enable-expert-parallel"
DP8 = "--data-parallel-size 8 --enable-expert-parallel"
