"""Reports of dry runs as data, and that serving needs none of it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from longcat_core.null_gpu.launches import OTHER, kind_of, short
from longcat_core.planning import dry_run
from longcat_core.planning.dry_run import Graph, Memory, Operation, Report, Request, Step, Tensors, grouped
from tests.core.test_laws import ROOMS, ROOT, modules_imported

STEP = Step(
    "prefill",
    tokens=2048,
    requests=16,
    operations=(
        Operation("product", "cublasGemmEx", 21, (10, 10)),
        Operation("product", "cublasSgemm_v2", 2, (1, 1), (0, 1)),
        Operation("norm", "vllm::rms_norm_kernel", 9, (4, 4)),
    ),
    unordered=(0, 1),
)
REPORT = Report(
    Request("chat", ("--enforce-eager",), (("VLLM_USE_V2_MODEL_RUNNER", "0"),)),
    engine="vLLM",
    machine="8 x H200",
    choices={"attention": "FLASH_ATTN_MLA"},
    tensors=(Tensors("layers.*.weight", 2, (3, 4), "bfloat16", "cuda:0", 48),),
    memory=Memory(10, 9, 5, 1, -3, 64512, 0),
    steps=(STEP,),
    graphs=(Graph("model", 3, {"aten::mm": 4}),),
    log=("Using FLASH_ATTN_MLA attention backend",),
)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    dry_run.write([REPORT, Report(Request("chat"), "vLLM", "H200", refused="no")], tmp_path / "reports.json")
    assert dry_run.read(tmp_path / "reports.json") == [REPORT, Report(Request("chat"), "vLLM", "H200", refused="no")]


def test_launches_are_summed_by_kind_and_in_a_layer() -> None:
    assert STEP.launches == 32
    assert STEP.by_kind() == {"product": 23, "norm": 9}
    assert STEP.in_layer(1) == {"product": 11, "norm": 4}
    assert STEP.in_layer(7) == {"product": 0, "norm": 0}
    assert (STEP.beside(0), STEP.beside(1), STEP.beside(7)) == ({}, {"product": 1}, {})


def test_tensors_that_differ_by_numbers_are_one_row_and_the_largest_comes_first() -> None:
    rows = grouped(
        [
            ("layers.0.norm.weight", (4,), "float32", "cuda:0", 16),
            ("layers.0.w13", (2, 4), "bfloat16", "cuda:0", 16),
            ("layers.1.w13", (2, 4), "bfloat16", "cuda:0", 16),
        ]
    )
    assert [(row.name, row.count, row.bytes) for row in rows] == [
        ("layers.*.w13", 2, 32),
        ("layers.*.norm.weight", 1, 16),
    ]


@pytest.mark.parametrize(
    ("mangled", "name", "kind"),
    [
        ("cublasGemmEx", "cublasGemmEx", "product"),
        ("ncclAllReduce", "ncclAllReduce", "collective"),
        ("triton fused_moe_kernel", "triton fused_moe_kernel", "experts"),
        (
            "_ZN4vllm15rms_norm_kernelIN3c108BFloat16ELi8ELi2ELb1EEEvPT_PKS3_lllllS6_lfii",
            "vllm::rms_norm_kernel",
            "norm",
        ),
        (
            "_ZN4vllm27concat_and_cache_mla_kernelI13__nv_bfloat16S1_LNS_18Fp8KVCacheDataTypeE0EEEvPKT_S5_PT0_PKliiiiiiiPKf",
            "vllm::concat_and_cache_mla_kernel",
            "cache",
        ),
        (
            "_ZN4vllm25fused_add_rms_norm_kernelIN3c108BFloat16ELi8ELb1EEENSt9enable_ifIXaagtT0_Li0Esr4vllm12_typeConvert"
            "IT_EE6existsEvE4typeEPS4_lS7_PKS4_fiil",
            "vllm::fused_add_rms_norm_kernel",
            "norm",
        ),
        (
            "_ZN7cutlass13device_kernelIN5flash20enable_sm90_or_laterINS1_16FlashAttnFwdSm90IiiEEEEEEvNT_6ParamsE",
            "flash::FlashAttnFwdSm90",
            "attention",
        ),
        ("sm90_fp8_gemm_1d2d.594c2e8941d75bdff3f524c988996c88", "sm90_fp8_gemm_1d2d", "product"),
        ("flashinfer fp8_blockscale_gemm_90.run_gemm", "flashinfer fp8_blockscale_gemm_90.run_gemm", "product"),
        ("flashinfer fused_moe_90.run_moe", "flashinfer fused_moe_90.run_moe", "experts"),
        (
            "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIiEESt5arrayIPcLm1EEEEviT0_T1_",
            "vectorized_elementwise_kernel Fill",
            OTHER,
        ),
    ],
)
def test_kernels_have_short_names_and_kinds(mangled: str, name: str, kind: str) -> None:
    assert (short(mangled), kind_of(short(mangled))) == (name, kind)


def test_serving_imports_nothing_of_the_dry_run() -> None:
    modules = {room.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for room in ROOMS}
    dry = {name for name in modules if ".dry_run" in name or ".null_gpu" in name or ".planning" in name}
    serving = [room for room in ROOMS if not room.startswith("longcat_cli/") and room[:-3].replace("/", ".") not in dry]
    assert [room for room in serving if modules_imported((ROOT / room).read_text(), dry)] == []
