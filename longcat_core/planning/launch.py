"""The stock command lines that start a deployment in vLLM and SGLang."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
import shlex

from longcat_core.planning.plan import Deployment


def commands(deployment: Deployment, requests: float) -> dict[str, str]:
    """By engine. requests: of one replica. What stock engines cannot do has no option here, see `remarks`."""
    return {"vLLM": _vllm(deployment, requests), "SGLang": _sglang(deployment, requests)}


def remarks(deployment: Deployment) -> list[str]:
    """How the command lines differ from what is planned."""
    found = []
    if deployment.overlap == "single-batch":
        found.append("stock engines have no overlap within a batch: these commands run one operation after the other")
    if deployment.overlap == "two-batches":
        found.append("overlap of two batches: --enable-dbo in vLLM is not tried with LongCat; SGLang refuses LongCat")
    if deployment.drafts.has_gate:
        found.append("the draft gate is trained for the checkpoint and named as docs/drafts.md says")
    if deployment.layout.dp > 1:
        found.append("data-parallel attention on GPUs is the engines' own, and not tried with LongCat")
    nodes = _nodes(deployment)
    if nodes > 1:
        found.append(f"{nodes} nodes: start each with the engine's own options for its rank and address")
    return found


def _nodes(deployment: Deployment) -> int:
    inside = {f.name: f.value for f in deployment.rates.figures}.get("nvlink_gpus", deployment.layout.gpus)
    return math.ceil(deployment.layout.gpus / inside)


def _model(deployment: Deployment) -> str:
    repositories = deployment.model.repositories or {}
    return shlex.quote(repositories.get(deployment.precision.release, deployment.model.name))


def _vllm(deployment: Deployment, requests: float) -> str:
    layout, words = deployment.layout, ["vllm serve", _model(deployment)]
    if layout.tp > 1:
        words.append(f"--tensor-parallel-size {layout.tp}")
    if layout.dp > 1:
        words.append(f"--data-parallel-size {layout.dp}")
    if layout.ep > 1:
        words.append("--enable-expert-parallel")
    if _nodes(deployment) > 1:
        words.append(f"--nnodes {_nodes(deployment)}")
    words += [f"--gpu-memory-utilization {deployment.share:g}", f"--max-num-seqs {math.ceil(requests)}"]
    if deployment.precision.cache != "bf16":
        words.append("--kv-cache-dtype fp8")
    if deployment.drafts.count:
        speculation = json.dumps({"method": "mtp", "num_speculative_tokens": deployment.drafts.count})
        words.append(f"--speculative-config {shlex.quote(speculation)}")
    return " ".join(words)


def _sglang(deployment: Deployment, requests: float) -> str:
    layout, words = deployment.layout, ["python -m sglang.launch_server --model-path", _model(deployment)]
    if layout.gpus > 1:
        words.append(f"--tp-size {layout.gpus}")
    if layout.dp > 1:
        words.append(f"--dp-size {layout.dp} --enable-dp-attention")
    if layout.ep > 1:
        words.append(f"--ep-size {layout.ep}")
    if _nodes(deployment) > 1:
        words.append(f"--nnodes {_nodes(deployment)}")
    words += [
        f"--mem-fraction-static {deployment.share:g}",
        f"--max-running-requests {math.ceil(requests * layout.dp)}",
    ]
    if deployment.precision.cache != "bf16":
        words.append("--kv-cache-dtype fp8_e4m3")
    if deployment.drafts.count:
        words.append(f"--speculative-algorithm NEXTN --speculative-num-steps {deployment.drafts.count}")
    return " ".join(words)
