"""The expected time of a MoE layer, computed: ours, vLLM's Triton with slots dropped, and with all of them computed.

    python -m benchmarks.gpu.expected

prints the tables of docs/kernels.md. Nothing here was measured: a launch costs what longcat_core/planning/data
assumes, each byte is read once, tiles are multiplied with their padding at an assumed share of the peak, and the slower
of the two is a product's time. compiled.json says for which tiles the code uses the device's own tensor-core
instructions, and that enough programs are at once on a multiprocessor for memory to be read at its rate.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.gpu.sizes import CHAT, TOKENS, Deployment
from longcat_core.config import LongcatConfig
from longcat_core.kernels.arrange import ONE_LAUNCH
from longcat_core.kernels.tiles import DEFAULT, tile_for
from longcat_core.planning.grouped_product import GroupedProduct, Load, memory_seconds, pass_seconds
from longcat_core.planning.hardware import Gpu, gpu

COMPILED = Path(__file__).with_name("compiled.json")
BF16_BYTES = 2
"""Of a number of hidden states and outputs."""


@dataclass(frozen=True)
class Situation:
    """A layer that is asked for."""

    gpu: Gpu
    config: LongcatConfig
    precision: str
    deployment: Deployment
    tokens: int

    @property
    def item_bytes(self) -> float:
        """Of a weight, with its share of the scales."""
        return 1 + 4 / 128**2 if self.precision == "fp8" else 2.0

    @property
    def ranks(self) -> int:
        return self.config.n_routed_experts // self.deployment.local_experts

    def load(self, is_remapped: bool) -> Load:
        """Rows of this rank's experts; remapped, each choice of a zero expert is one of some FFN expert."""
        config = self.config
        choices = config.moe_topk * (1.0 if is_remapped else config.n_routed_experts / config.num_experts)
        tokens = self.tokens if self.deployment.name == "tensor" else self.tokens * self.ranks
        return Load(tokens, self.deployment.local_experts, choices / config.n_routed_experts)

    def seen(self, load: Load) -> tuple[float, float]:
        """Hidden states that the rank has, and slots of its ids."""
        if self.deployment.name == "tensor":
            return self.tokens, self.tokens * self.config.moe_topk
        return load.rows, load.rows


def floor_seconds(of: Situation) -> float:
    """Weights of the experts that have rows, hidden states and result once, or the rows' products: no launch."""
    load = of.load(is_remapped=False)
    states, _ = of.seen(load)
    hidden, inner = of.config.hidden_size, of.config.expert_ffn_hidden_size
    moved = load.touched_experts * 3 * hidden * inner * of.item_bytes + 2 * states * hidden * BF16_BYTES
    rate = of.gpu.operations_per_second[of.precision] * of.gpu.assumptions.product_share
    return max(memory_seconds(of.gpu, moved), load.rows * 6 * hidden * inner / rate)


def our_seconds(of: Situation) -> float:
    """arrange, both products, the sum, and the identity; in FP8 the hidden states are quantised first."""
    load = of.load(is_remapped=False)
    states, slots = of.seen(load)
    hidden, inner = of.config.hidden_size, of.config.expert_ffn_hidden_size
    experts = of.config.n_routed_experts if of.deployment.name == "tensor" else of.deployment.local_experts
    tile = tile_for(DEFAULT, of.precision, -(-round(slots) // experts))
    blocks, activation = load.blocks(tile.rows), 1 if of.precision == "fp8" else 2
    weights = load.touched_experts * hidden * inner * of.item_bytes
    read_states = min(load.rows, states) * hidden * activation
    is_older = uses_older_instructions(of.precision, tile.rows, of.gpu.architecture_name)
    gate_up = GroupedProduct(
        blocks=blocks,
        block_rows=tile.rows,
        block_columns=tile.columns,
        columns=inner,
        depth=hidden,
        matrices=2,
        bytes=2 * weights + read_states + load.rows * inner * activation,
        has_older_instructions=is_older,
    )
    down = GroupedProduct(
        blocks=blocks,
        block_rows=tile.rows,
        block_columns=tile.columns,
        columns=hidden,
        depth=inner,
        matrices=1,
        bytes=weights + load.rows * (inner * activation + hidden * BF16_BYTES),
        has_older_instructions=is_older,
    )
    launches = 1 if slots <= ONE_LAUNCH else 3
    arranging = launches * pass_seconds(of.gpu, slots * 12)
    quantising = pass_seconds(of.gpu, states * hidden * 3) if of.precision == "fp8" else 0.0
    summing = pass_seconds(of.gpu, (load.rows + states) * hidden * BF16_BYTES)
    identity = pass_seconds(of.gpu, 3 * states * hidden * BF16_BYTES)
    products = gate_up.seconds(of.gpu, of.precision) + down.seconds(of.gpu, of.precision)
    return quantising + arranging + products + summing + identity


def vllm_seconds(of: Situation, is_remapped: bool) -> float:
    """moe_align_block_size, the first product, the activation over all slots, the second product, moe_sum, and the
    identity; in FP8 the hidden states are quantised first, and the activation quantises."""
    load = of.load(is_remapped)
    states, slots = of.seen(load)
    hidden, inner = of.config.hidden_size, of.config.expert_ffn_hidden_size
    rows, columns = vllm_tile(of.precision, round(states))
    blocks, activation = load.blocks(rows), 1 if of.precision == "fp8" else 2
    weights = load.touched_experts * hidden * inner * of.item_bytes
    read_states = min(load.rows, states) * hidden * activation
    is_older = of.precision != "fp8" and rows < 64
    first = GroupedProduct(
        blocks=blocks,
        block_rows=rows,
        block_columns=columns,
        columns=2 * inner,
        depth=hidden,
        matrices=1,
        bytes=2 * weights + read_states + load.rows * 2 * inner * BF16_BYTES,
        has_older_instructions=is_older,
    )
    second = GroupedProduct(
        blocks=blocks,
        block_rows=rows,
        block_columns=columns,
        columns=hidden,
        depth=inner,
        matrices=1,
        bytes=weights + load.rows * (inner * activation + hidden * BF16_BYTES),
        has_older_instructions=is_older,
    )
    aligning = 2 * pass_seconds(of.gpu, slots * 8)
    quantising = pass_seconds(of.gpu, states * hidden * 3) if of.precision == "fp8" else 0.0
    activating = pass_seconds(of.gpu, slots * inner * (2 * BF16_BYTES + activation))
    summing = pass_seconds(of.gpu, (load.rows + states) * hidden * BF16_BYTES)
    identity = pass_seconds(of.gpu, 3 * states * hidden * BF16_BYTES)
    products = first.seconds(of.gpu, of.precision) + second.seconds(of.gpu, of.precision)
    return quantising + aligning + products + activating + summing + identity


def vllm_tile(precision: str, tokens: int) -> tuple[int, int]:
    """Rows and columns that vLLM 0.32 takes for experts that it has no tuned configuration for, as it has none for
    LongCat's (`get_default_config` in vllm/model_executor/layers/fused_moe/fused_moe.py)."""
    if precision == "fp8":
        return 16 if tokens <= 64 else 64, 64 if tokens <= 8 else 128
    rows = 16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128
    return rows, 64 if tokens <= 64 else 128


@cache
def uses_older_instructions(precision: str, block_rows: int, architecture: str) -> bool:
    """Whether our code for blocks of so many rows has no tensor-core instruction of the device's own."""
    own = {"sm_90": ("HGMMA", "QGMMA"), "sm_100": ("UTCHMMA", "UTCQMMA")}[architecture]
    name = f"experts in {precision}, blocks of {block_rows}: gate_up"
    codes = [record[name][architecture] for record in json.loads(COMPILED.read_text()).values()]
    return not all(any(instruction in code["tensor_core"] for instruction in own) for code in codes)


GPUS = ("H100", "H200")
DEPLOYMENTS = (Deployment("tensor", 64), Deployment("data", 64), Deployment("data", 4))
_WHERE = {
    "tensor": "{local} local experts of {ranks} ranks, every rank sees the T tokens",
    "data": "{local} local experts of {ranks} ranks, each rank brings T tokens",
}


def tables(gpu_name: str) -> Iterator[str]:
    """Microseconds of a layer, and how many times ours."""
    for deployment in DEPLOYMENTS:
        ranks = CHAT.n_routed_experts // deployment.local_experts
        yield f"{gpu_name}, {_WHERE[deployment.name].format(local=deployment.local_experts, ranks=ranks)}:"
        lines = [
            "| T | bf16: ours | dropped / ours | remapped / ours | floor / ours "
            "| FP8: ours | dropped / ours | remapped / ours | floor / ours |",
            "|" + "---|" * 9,
        ]
        for tokens in TOKENS:
            cells = [f"{tokens:,}"]
            for precision in ("16 bit", "fp8"):
                of = Situation(gpu(gpu_name), CHAT, precision, deployment, tokens)
                ours = our_seconds(of)
                others = (vllm_seconds(of, is_remapped=False), vllm_seconds(of, is_remapped=True))
                cells += [f"{ours * 1e6:,.0f} us", *(f"{other / ours:.2f}" for other in others)]
                cells.append(f"{floor_seconds(of) / ours:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        yield "\n".join(lines)


if __name__ == "__main__":
    for name in GPUS:
        print(*tables(name), sep="\n\n", end="\n\n")
