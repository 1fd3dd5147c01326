"""What `longcat doctor` says of SGLang: its version, what took hold in this process, what a LongCat model would get."""

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
    findings.append(_platform())
    if checkpoint is not None:
        findings += checkpoint_findings(checkpoint)
    if not any(finding.problem for finding in findings):
        findings += devices.current().implementations()
    return findings


def _platform() -> Finding:
    from sglang.srt.platforms import current_platform

    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    selected = os.environ.get("SGLANG_PLATFORM")
    if current_platform.is_cpu() or current_platform.is_cuda():
        return Finding("platform", name)
    wanted = f"SGLANG_PLATFORM={selected!r} keeps longcat-serving from preparing a CPU; unset it" if selected else ""
    return Finding("platform", name, wanted)
