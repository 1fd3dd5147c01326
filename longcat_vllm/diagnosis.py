"""What `longcat doctor` says of vLLM: its version, what was hooked in this process, what a LongCat model would get."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from pathlib import Path

from longcat_core.plugin.diagnosis import Finding, checkpoint_findings, hook_findings, version_of
from longcat_vllm import devices
from longcat_vllm.engine import VLLM
from longcat_vllm.hooks import HOOKS


def diagnose(checkpoint: Path | None = None) -> list[Finding]:
    """Findings in order of importance. `checkpoint`: a directory to check as well, and to choose kernels for.

    Loads vLLM's plugins in this process, as any vLLM process does.
    """
    findings = [version_of(VLLM)]
    if findings[0].problem:
        return findings
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    findings += _hooks()
    findings.append(devices.found())
    if checkpoint is not None:
        findings += checkpoint_findings(checkpoint)
    if not any(finding.problem for finding in findings):
        from longcat_core.weights.checkpoint import read_config  # which needs torch

        findings += devices.current().implementations(read_config(checkpoint) if checkpoint is not None else None)
    return findings


def _hooks() -> list[Finding]:
    plugins = os.environ.get("VLLM_PLUGINS")
    is_left_out = plugins is not None and "longcat" not in plugins.split(",")
    left_out = f"VLLM_PLUGINS={plugins!r} leaves the plugin out; unset it or add 'longcat'" if is_left_out else ""
    return hook_findings(VLLM, HOOKS, "longcat_vllm", "vllm.general_plugins", left_out)
