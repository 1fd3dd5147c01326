"""What `longcat doctor` says of SGLang: its version, what was hooked here, what a LongCat model would get."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from pathlib import Path

from longcat_core.plugin.diagnosis import Finding, checkpoint_findings, hook_findings, version_of
from longcat_sglang import devices
from longcat_sglang.devices.cpu.platform import prepare_cpu_as_for_longcat
from longcat_sglang.engine import SGLANG
from longcat_sglang.hooks import HOOKS


def diagnose(checkpoint: Path | None = None) -> list[Finding]:
    """Findings in order of importance. `checkpoint`: a directory to check as well, and to choose kernels for.

    Loads SGLang's plugins in this process, as any SGLang process does.
    """
    findings = [version_of(SGLANG)]
    if findings[0].problem:
        return findings
    plugins = os.environ.get("SGLANG_PLUGINS")
    if plugins and "longcat" not in plugins.split(","):
        return [*findings, Finding("SGLANG_PLUGINS", plugins, "leaves the plugin out; unset it or add 'longcat'")]
    from sglang.srt.plugins import load_plugins

    prepare_cpu_as_for_longcat()
    load_plugins()
    findings += hook_findings(SGLANG, HOOKS, "longcat_sglang", "sglang.srt.plugins", left_out="")
    findings.append(devices.found())
    if checkpoint is not None:
        findings += checkpoint_findings(checkpoint)
    if not any(finding.problem for finding in findings):
        findings += devices.current().implementations()
    return findings
