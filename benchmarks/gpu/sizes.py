"""What is measured on a GPU: the sizes of LongCat-Flash-Chat, and tiny ones with which the same code runs on a CPU."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.kernels.tiles import DEFAULT, TILES, Tile

CHAT = LongcatConfig(
    vocab_size=131072,
    hidden_size=6144,
    num_layers=28,
    num_attention_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    ffn_hidden_size=12288,
    expert_ffn_hidden_size=2048,
    n_routed_experts=512,
    zero_expert_num=256,
    moe_topk=12,
    max_position_embeddings=131072,
    rope=RopeConfig(theta=1e7),
    routed_scaling_factor=6.0,
)
"""LongCat-Flash-Chat as published."""

TOKENS = (1, 8, 32, 64, 96, 192, 512, 2048, 8192)
SHARED_BYTES = 227 * 1024
"""Of a program on Hopper and Blackwell."""


@dataclass(frozen=True)
class Deployment:
    """Which rows a rank's experts get from T tokens."""

    name: str
    """"tensor": attention is tensor parallel, so that every rank sees all T tokens and computes its experts' part;
    "data": attention is data parallel, each rank brings T tokens, and a rank gets the rows of its experts alone."""
    local_experts: int


@dataclass(frozen=True)
class Sizes:
    """What `benchmarks.gpu.measure` measures."""

    config: LongcatConfig
    precisions: tuple[str, ...]
    """As `kernels.tiles` names them."""
    tokens: tuple[int, ...]
    deployments: tuple[Deployment, ...]
    skewed: tuple[Deployment, ...]
    """Those that are measured with a router that prefers some experts as well."""
    tiles: dict[str, tuple[Tile, ...]]
    """By precision: what is tried."""
    tile_tokens: tuple[int, ...]
    compilers: int
    """Processes that compile tiles at once."""
    layer_ranks: int
    """Tensor-parallel ranks of the layer that is captured in a graph."""
    layer_tokens: tuple[int, ...]
    layer_context: int
    layer_streams: tuple[int, ...]
    """2: the MoE is on a stream of its own beside the dense branch."""
    ranks: int
    """Of the deployment with expert parallelism whose rank is measured: EP 128 in the report."""
    batch: int
    """Requests a rank, each with one draft."""
    context: int
    copied_bytes: int
    """Of the copy that gives the memory's rate."""
    read_bytes: int
    """Between repetitions, so that L2 is cold: some times its size."""
    product_size: int
    """Rows, columns and depth of the product that gives the tensor cores' rate."""
    is_compiled: bool
    """Whether chains of torch operations are also compiled by torch.compile."""
    parity_tests: tuple[str, ...]
    served: LongcatConfig | None
    """What vLLM serves end to end, with random weights."""


def _tiles(precision: str) -> tuple[Tile, ...]:
    """Those that are taken without tuning, and those whose gate_up fits into shared memory, whose sums fit into half of
    the registers, and of which each group of four warps has 64 rows of its own."""
    item = 1 if precision == "fp8" else 2
    columns_depths = [(128, 128)] if precision == "fp8" else list(product((64, 128, 256), (64, 128)))
    found = [tile for _, tile in TILES[DEFAULT][precision]]
    for rows, (columns, depth), warps, stages, is_swapped in product(
        (16, 32, 64, 128), columns_depths, (4, 8), (3, 4, 5), (True, False)
    ):
        shared = stages * depth * (rows + 2 * columns) * item
        sums = 2 * rows * columns / (32 * warps)
        # The side of 64 is the weights' where the tile is swapped, the rows' where it is not.
        fills = (columns if is_swapped else rows) >= 16 * warps
        if shared <= SHARED_BYTES and sums <= 128 and fills and (rows < 64 or not is_swapped or stages == 3):
            found.append(Tile(rows, columns, depth, warps, stages, is_swapped))
    return tuple(dict.fromkeys(found))


TENSOR_64, DATA_64 = Deployment("tensor", 64), Deployment("data", 64)
FULL = Sizes(
    config=CHAT,
    precisions=("16 bit", "fp8"),
    tokens=TOKENS,
    deployments=(TENSOR_64, DATA_64, Deployment("data", 4), Deployment("data", 16), Deployment("tensor", 16)),
    skewed=(TENSOR_64, DATA_64),
    tiles={precision: _tiles(precision) for precision in ("16 bit", "fp8")},
    tile_tokens=(96, 2048, 1, 8192, 512, 192),
    compilers=12,
    layer_ranks=8,
    layer_tokens=(1, 32, 96, 192),
    layer_context=1024,
    layer_streams=(1, 2),
    ranks=128,
    batch=96,
    context=5120,
    copied_bytes=1 << 30,
    read_bytes=1 << 28,
    product_size=8192,
    is_compiled=True,
    parity_tests=("tests/kernels",),
    served=replace(CHAT, num_layers=2, n_routed_experts=128, zero_expert_num=64),
)
"""LongCat-Flash-Chat's width."""

_TINY = replace(
    CHAT,
    vocab_size=512,
    hidden_size=128,
    num_layers=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    ffn_hidden_size=64,
    expert_ffn_hidden_size=128,
    n_routed_experts=4,
    zero_expert_num=2,
    moe_topk=3,
    max_position_embeddings=64,
)
TINY = Sizes(
    config=_TINY,
    precisions=("16 bit", "fp8"),
    tokens=(2,),
    deployments=(Deployment("tensor", 2), Deployment("data", 2)),
    skewed=(Deployment("tensor", 2),),
    tiles={
        "16 bit": (Tile(16, 128, 64, 4, 3, is_swapped=True), Tile(16, 64, 64, 4, 3, is_swapped=False)),
        "fp8": (Tile(16, 128, 128, 4, 3, is_swapped=True),),
    },
    tile_tokens=(2,),
    compilers=1,
    layer_ranks=1,
    layer_tokens=(2,),
    layer_context=8,
    layer_streams=(1,),
    ranks=2,
    batch=2,
    context=8,
    copied_bytes=1 << 16,
    read_bytes=1 << 10,
    product_size=64,
    is_compiled=False,
    parity_tests=("tests/kernels/test_gpu.py",),
    served=None,
)
"""For Triton's interpreter: seconds."""
