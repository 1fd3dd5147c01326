"""The tests of `interpreted` in a process of their own, with Triton's interpreter."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from tests.interpreted import run_interpreted


def test_moe_kernels_are_their_reference_where_vllm_calls_them() -> None:
    run_interpreted(Path(__file__).parent / "interpreted")
