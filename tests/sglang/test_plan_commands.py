"""The command lines that `longcat plan` prints for SGLang are read by SGLang's own parser."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import shlex

from sglang.srt.server_args import ServerArgs

from longcat_core.planning.drafts import Drafts
from longcat_core.planning.hardware import gpu
from longcat_core.planning.launch import commands
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment
from longcat_core.planning.rates import rates


def test_sglang_reads_the_command_of_a_plan() -> None:
    """With every option that a plan may name."""
    speed, form = rates(gpu("H200")), precision("fp8", "fp8")
    deployment = Deployment(model("chat"), "16 x H200", speed, Layout(8, 2, 16), form, 4096, drafts=Drafts(2, 0.9))
    python, flag, module, *words = shlex.split(commands(deployment, 12)["SGLang"])
    assert (python, flag, module) == ("python", "-m", "sglang.launch_server")
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    read = parser.parse_args(words)
    assert read.model_path == "meituan-longcat/LongCat-Flash-Chat-FP8"
    assert (read.tp_size, read.dp_size, read.ep_size, read.enable_dp_attention) == (16, 2, 16, True)
    assert (read.nnodes, read.max_running_requests, read.mem_fraction_static) == (2, 24, 0.9)
    assert read.kv_cache_dtype == "fp8_e4m3"
    assert (read.speculative_algorithm, read.speculative_num_steps) == ("NEXTN", 2)
