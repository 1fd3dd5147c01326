"""vLLM's side of the benchmarks in Triton's interpreter, in a process of its own: is vLLM called as it wants to be?

Prints, as JSON, the worst token's error of each case, what came of small kernels, and tiles. vLLM's compiled operators
are stood in for by torch's, as its CPU build has none of them; its Triton kernels and the Python around them are its
own. Wants `ENVIRONMENT`.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import vllm_kernels
from benchmarks.gpu.cases import Context, rows
from benchmarks.gpu.checks import truth, worst_token_error
from benchmarks.gpu.expected import vllm_tile
from benchmarks.gpu.inputs import random_batch, random_weights
from benchmarks.gpu.sizes import TINY, Deployment
from benchmarks.gpu.stages import pieces
from benchmarks.gpu.timing import ClockTimer
from longcat_core.kernels.arrange import arrange_reference
from longcat_core.weights.blocks import quantize_blocks
from tests.kernels import interpreter

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",  # vLLM keeps Triton although no driver is active
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU = torch.device("cpu")
LIBRARIES = [torch.library.Library(name, "FRAGMENT") for name in ("_moe_C", "_C")]
"""Kept, as operators are gone with their library."""


def local_experts(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    local = ids.long()
    return local if expert_map is None else torch.where(local >= 0, expert_map[local.clamp(min=0)].long(), -1)


def moe_align_block_size(
    ids: Tensor, experts: int, block: int, slots: Tensor, blocks: Tensor, used: Tensor,
    expert_map: Tensor | None = None, scatter: Tensor | None = None,
) -> None:  # fmt: skip
    found, of_blocks, rows = arrange_reference(local_experts(ids, expert_map).int(), experts, block)
    slots.fill_(ids.numel())
    blocks.fill_(-1)
    slots[:rows], blocks[: rows // block], used[0] = torch.tensor(found), torch.tensor(of_blocks), rows


def moe_sum(outputs: Tensor, result: Tensor, ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    wide = outputs.float()
    if ids is not None:
        wide = wide.masked_fill((local_experts(ids, expert_map) < 0).unsqueeze(-1), 0.0)
    result.copy_(wide.sum(dim=1))


def topk_softmax(
    weights: Tensor,
    ids: Tensor,
    token_expert_indices: Tensor,
    logits: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    is_padding: Tensor | None,
) -> None:
    scores = logits.float().softmax(dim=-1)
    ids.copy_((scores if bias is None else scores + bias).topk(ids.shape[1], dim=-1).indices)
    weights.copy_(scores.gather(1, ids.long()))


def silu_and_mul_per_block_quant(
    result: Tensor, x: Tensor, scales: Tensor, group: int, limit: Tensor | None, is_transposed: bool
) -> None:
    gate, up = x.float().chunk(2, dim=1)
    codes, found = quantize_blocks(F.silu(gate) * up, (1, group))
    result.copy_(codes)
    scales.copy_(found)


def silu_and_mul(result: Tensor, x: Tensor) -> None:
    gate, up = x.float().chunk(2, dim=1)
    result.copy_(F.silu(gate) * up)


def define() -> None:
    moe, common = LIBRARIES
    optional = "Tensor? topk_ids=None, Tensor? expert_map=None"
    moe.define(
        "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, "
        "Tensor! experts_ids, Tensor! num_tokens_post_pad, Tensor? expert_map=None, Tensor? scatter_idx=None) -> ()"
    )
    moe.define(f"moe_sum(Tensor input, Tensor! output, {optional}) -> ()")
    moe.impl("moe_align_block_size", moe_align_block_size, "CPU")
    moe.impl("moe_sum", moe_sum, "CPU")
    moe.define(
        "topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, "
        "bool renormalize, Tensor? bias, Tensor? is_padding) -> ()"
    )
    moe.impl("topk_softmax", topk_softmax, "CPU")
    common.define(
        "silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub, "
        "bool is_scale_transposed) -> ()"
    )
    common.impl("silu_and_mul_per_block_quant", silu_and_mul_per_block_quant, "CPU")
    common.define("silu_and_mul(Tensor! out, Tensor input) -> ()")
    common.impl("silu_and_mul", silu_and_mul, "CPU")


def errors() -> dict[str, float]:
    found = {}
    config = TINY.config
    for precision in ("16 bit", "fp8"):
        weights = random_weights(config, 2, precision, CPU)
        theirs = vllm_kernels.TritonMoE(config, weights, is_compiled=False)
        for kind, is_remapped in (("tensor", False), ("tensor", True), ("data", False)):
            batch = random_batch(config, Deployment(kind, 2), 3, "random", is_remapped, CPU)
            name = f"{precision}, {kind}, {'remapped' if is_remapped else 'dropped'}"
            found[name] = worst_token_error(theirs(batch), truth(batch, weights))
    return found


def pieces_of_vllm() -> dict[str, str]:
    """What comes of vLLM's kernel for each piece: "result", or what went wrong."""
    # vLLM's kernel of zero experts does 256 columns at a time, and leaves out what is over.
    sizes = replace(TINY, config=replace(TINY.config, hidden_size=256))
    context = Context(sizes, CPU, "interpreter", ClockTimer(), frozenset())
    cases = [case for case in pieces.cases(context, 3) if case.fields["kernel"] == "vLLM"]
    return {
        row["case"]["piece"]: "result" if "result" in row else (row.get("wrong") or row["error"])
        for row in rows(cases, context)
    }


def tiles() -> dict[str, list[tuple[int, int]]]:
    """Rows and columns: those that times are computed with, and vLLM's."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    found = {}
    for precision, dtype, block in (("16 bit", None, None), ("fp8", "fp8_w8a8", [128, 128])):
        for tokens in (1, 8, 9, 32, 33, 64, 65, 96, 97, 512, 513, 8192):
            theirs = get_default_config(tokens, 64, 2048, 6144, 12, dtype, block)
            both = [vllm_tile(precision, tokens), (theirs["BLOCK_SIZE_M"], theirs["BLOCK_SIZE_N"])]
            found[f"{precision}, {tokens} tokens"] = both
    return found


def prepare() -> None:
    """Before anything else of vLLM is imported."""
    import vllm.platforms

    vllm.platforms.vllm_version_matches_substr = lambda _: False  # "cpu" in its version has vLLM leave Triton out
    sys.modules["vllm._C"] = ModuleType("vllm._C")  # operators for a CPU, which may be none that this one runs
    define()
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON
    fused_moe.get_device_name_as_file_name = lambda *_: "NVIDIA_H100_80GB_HBM3"
    vllm_kernels.require = lambda: None  # it asks for a GPU
    interpreter.repair()
    torch.set_num_threads(1)


if __name__ == "__main__":
    prepare()
    print(json.dumps({"errors": errors(), "tiles": tiles(), "pieces": pieces_of_vllm()}))
