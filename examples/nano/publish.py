"""A trained model as LongCat-Flash-Chat is published: what `vllm serve` and `longcat` load."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from longcat_cli import example_tokenizer
from longcat_core import spellings
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint


def write(model: LongcatForCausalLM, directory: Path) -> None:
    """Write `config.json`, `generation_config.json` and sharded bf16 safetensors, whose router is fp32. The tokenizer
    is written separately."""
    ids = example_tokenizer.TOKEN_IDS
    with_mtp = {"num_nextn_predict_layers": 1} if model.model.mtp is not None else {}
    write_json(
        directory / "config.json", spellings.published(model.config) | ids | {"torch_dtype": "bfloat16"} | with_mtp
    )
    write_json(directory / "generation_config.json", ids)
    tensors = {
        name: tensor.cpu() if ".mlp.router." in name else tensor.cpu().to(torch.bfloat16)
        for name, tensor in model.published().items()
    }
    # Published checkpoints are sharded, so this is too, however small it is.
    checkpoint.save(tensors, directory, max_shard_size=sum(tensor.nbytes for tensor in tensors.values()) // 3)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file appears whole or not at all, whatever was there before."""
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
