"""What `longcat doctor` says of SGLang: its version, what took hold in this process, what a LongCat model would get."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from longcat_core.diagnosis import Finding, checkpoint_finding, version_of
from longcat_sglang import compat


def diagnose(checkpoint: Path | None = None) -> list[Finding]:
    """Findings in order of importance. `checkpoint`: a directory to check as well, and to choose kernels for.

    Loads SGLang's plugins in this process, as any SGLang process does.
    """
    findings = [version_of(compat.SGLANG)]
    if findings[0].problem:
        return findings
    plugins = os.environ.get("SGLANG_PLUGINS")
    if plugins and "longcat" not in plugins.split(","):
        return [*findings, Finding("SGLANG_PLUGINS", plugins, "leaves the plugin out; unset it or add 'longcat'")]
    from sglang.srt.plugins import load_plugins

    load_plugins()
    findings += _hooks()
    findings.append(_platform())
    if checkpoint is not None:
        findings.append(checkpoint_finding(checkpoint))
    if not any(finding.problem for finding in findings):
        findings += _implementations()
    return findings


def _hooks() -> list[Finding]:
    return [Finding(name, place, _unhooked(name, place)) for name, place in compat.hooked().items()]


def _unhooked(name: str, place: str) -> str:
    if place.startswith("longcat_sglang"):
        return ""
    if name in compat.SGLANG.failures:
        return f"the hook failed: {compat.SGLANG.failures[name]}"
    points = [point.value for point in importlib.metadata.entry_points(group="sglang.srt.plugins")]
    if "longcat_sglang:register" not in points:
        return "longcat-serving is not installed in this environment; run pip install longcat-serving"
    return "SGLang did not apply the hook; its log says why"


def _platform() -> Finding:
    from sglang.srt.platforms import current_platform

    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    selected = os.environ.get("SGLANG_PLATFORM")
    if current_platform.is_cpu() or current_platform.is_cuda():
        return Finding("platform", name)
    wanted = f"SGLANG_PLATFORM={selected!r} keeps longcat-serving from preparing a CPU; unset it" if selected else ""
    return Finding("platform", name, wanted)


def _implementations() -> list[Finding]:
    import torch
    from sglang.srt.utils import is_cpu

    if not is_cpu():
        return [
            Finding("attention", "SGLang's MLA backend of its choice (--attention-backend)"),
            Finding("MoE", f"zero experts as id -1, skipped by one of {', '.join(compat.SKIP_ZERO_EXPERTS)}"),
        ]
    from longcat_sglang.attention import LatentAttentionBackend
    from longcat_sglang.cpu_experts import select_cpu_kernel

    backend = f"{LatentAttentionBackend.__module__}.{LatentAttentionBackend.__qualname__}"
    kernels = [
        f"{select_cpu_kernel(dtype)} in {str(dtype).removeprefix('torch.')}"
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return [
        Finding("attention", f"{backend}: any sizes, chunked prefill, radix cache"),
        Finding("MoE", f"rows of FFN experts only; {', '.join(kernels)}"),
    ]
