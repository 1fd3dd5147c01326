"""`longcat make-checkpoint`: a small random LongCat-Flash, laid out as LongCat-Flash-Chat is published."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from longcat_cli import example_tokenizer
from longcat_core import spellings
from longcat_core.chat.templates import CHAT, TEMPLATES, Template
from longcat_core.config import ConfigError, LongcatConfig

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class ChatTemplate(StrEnum):
    chat = "chat"
    thinking = "thinking"
    thinking_2601 = "thinking-2601"


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it: a new or an empty directory.")],
    hidden_size: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256,
    layers: Annotated[int, typer.Option(help="Decoder layers, each with two attentions and one MoE.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    q_lora_rank: Annotated[int, typer.Option(help="Rank of the queries.")] = 96,
    kv_lora_rank: Annotated[int, typer.Option(help="Published value; GPU kernels take no other.")] = 512,
    qk_nope_head_dim: Annotated[int, typer.Option(help="Published value, as above.")] = 128,
    qk_rope_head_dim: Annotated[int, typer.Option(help="Even; published value, as above.")] = 64,
    v_head_dim: Annotated[int, typer.Option(help="Published value, as above.")] = 128,
    ffn_hidden_size: Annotated[int, typer.Option(help="Inner size of the dense FFNs.")] = 512,
    expert_ffn_hidden_size: Annotated[int, typer.Option(help="Inner size of one FFN expert.")] = 128,
    routed_experts: Annotated[int, typer.Option(help="FFN experts.")] = 16,
    zero_experts: Annotated[int, typer.Option(help="Experts that return their input and cost nothing.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of either kind that a token takes.")] = 6,
    vocab_size: Annotated[int, typer.Option(help="At least 264, or 276: the bytes and the special tokens.")] = 2048,
    max_position_embeddings: Annotated[int, typer.Option(help="Longest context, in tokens.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed and sizes, same weights.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of all weights but the router's, which are float32.")] = Dtype.bfloat16,
    tie_embeddings: Annotated[bool, typer.Option("--tie-embeddings", help="Use the embedding as output head.")] = False,
    chat_template: Annotated[ChatTemplate, typer.Option(help="Whose format it has.")] = ChatTemplate.chat,
    no_mtp: Annotated[bool, typer.Option("--no-mtp", help="Leave out the draft layer (MTP).")] = False,
) -> None:
    """Write a small random LongCat-Flash checkpoint with a tokenizer and a chat template.

    It has the files and tensor names of LongCat-Flash-Chat, so that whatever loads the one loads the other.
    """
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_layers": layers,
        "num_attention_heads": heads,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": qk_nope_head_dim,
        "qk_rope_head_dim": qk_rope_head_dim,
        "v_head_dim": v_head_dim,
        "ffn_hidden_size": ffn_hidden_size,
        "expert_ffn_hidden_size": expert_ffn_hidden_size,
        "n_routed_experts": routed_experts,
        "zero_expert_num": zero_experts,
        "moe_topk": top_k,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_embeddings,
    }
    published = {"rope_theta": 1e7, "routed_scaling_factor": 6.0, "rms_norm_eps": 1e-5}
    console = Console(stderr=True, highlight=False)
    try:
        config = spellings.read(sizes | published)
        with console.status("importing torch") as status:
            import torch

            make_checkpoint(
                directory,
                config,
                seed=seed,
                dtype=getattr(torch, dtype.value),
                with_mtp=not no_mtp,
                template=TEMPLATES[chat_template],
                report=status.update,
            )
    except (ConfigError, OSError) as error:
        console.print(f"longcat make-checkpoint: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    parameters = config.total_parameters / 1e6
    typer.echo(
        f"{directory}: {parameters:.1f} M parameters, {config.n_routed_experts} FFN and "
        f"{config.zero_expert_num} zero experts a layer; try `vllm serve {directory}` or "
        f"`python -m sglang.launch_server --model-path {directory}`"
    )


def make_checkpoint(
    directory: Path,
    config: LongcatConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    with_mtp: bool = True,
    template: Template = CHAT,
    report: Callable[[str], object] = lambda step: None,
) -> None:
    """Write `config.json`, sharded safetensors with their index, tokenizer and chat template.

    The bytes depend on the arguments, the versions of torch, tokenizers and Python, and on nothing else. The
    directory appears whole or not at all. `report` is called with the name of each step.

    Raises:
        ConfigError: if the vocabulary is too small for the tokenizer.
        FileExistsError: if `directory` exists and is anything but an empty directory.
    """
    directory = directory.absolute()
    least = example_tokenizer.min_vocab_size(template)
    if config.vocab_size < least:
        raise ConfigError(
            f"vocab_size: {config.vocab_size}, wanted at least {least} (256 bytes and the special tokens)"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory; name another one, or remove it")

    unfinished = directory.with_name(f".{directory.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, config, seed, dtype, with_mtp, template, report)
        unfinished.rename(directory)
    except BaseException:  # an interrupt as well: nothing half-made stays
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(
    directory: Path,
    config: LongcatConfig,
    seed: int,
    dtype: torch.dtype,
    with_mtp: bool,
    template: Template,
    report: Callable[[str], object],
) -> None:
    from longcat_cli import random_weights
    from longcat_core.weights import checkpoint

    report("training the tokenizer")
    example_tokenizer.write(directory, config.vocab_size, config.max_position_embeddings, template=template)
    ids = example_tokenizer.TOKEN_IDS
    _write_json(
        directory / "config.json",
        spellings.published(config)
        | ids
        | {"torch_dtype": str(dtype).removeprefix("torch.")}
        | ({"num_nextn_predict_layers": 1} if with_mtp else {}),
    )
    _write_json(directory / "generation_config.json", ids)

    report("drawing weights")
    tensors = random_weights.draw(config, seed=seed, dtype=dtype, with_mtp=with_mtp)
    report("writing shards")
    total = sum(tensor.nbytes for tensor in tensors.values())
    # Published checkpoints are sharded, so the example is too, however small it is.
    checkpoint.save(tensors, directory, max_shard_size=min(total // 3, 2**32))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
