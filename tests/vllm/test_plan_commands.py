"""The command lines that `longcat plan` prints for vLLM are read by vLLM's own parser."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shlex

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from longcat_core.planning.drafts import Drafts
from longcat_core.planning.hardware import gpu
from longcat_core.planning.launch import commands
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment
from longcat_core.planning.rates import rates


def test_vllm_reads_the_command_of_a_plan() -> None:
    """With every option that a plan may name."""
    speed, form = rates(gpu("H200")), precision("fp8", "fp8")
    deployment = Deployment(model("chat"), "16 x H200", speed, Layout(8, 2, 16), form, 4096, drafts=Drafts(2, 0.9))
    program, serve, *words = shlex.split(commands(deployment, 12)["vLLM"])
    assert (program, serve) == ("vllm", "serve")
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert read.model_tag == "meituan-longcat/LongCat-Flash-Chat-FP8"
    assert (read.tensor_parallel_size, read.data_parallel_size, read.enable_expert_parallel) == (8, 2, True)
    assert (read.nnodes, read.max_num_seqs, read.gpu_memory_utilization) == (2, 12, 0.9)
    assert read.kv_cache_dtype == "fp8"
    assert read.speculative_config == {"method": "mtp", "num_speculative_tokens": 2}
