"""What `longcat doctor` reports: one finding a line, made by each engine package for its own engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from longcat_core.plugin.engine import Engine
from longcat_core.plugin.hooks import Hook, Stage, of_stage


class Finding(NamedTuple):
    subject: str
    value: str
    problem: str = ""
    """Empty if all is well; else what is wanted and what to do."""


def version_of(engine: Engine) -> Finding:
    problem = "" if engine.is_supported() else f"wanted {engine.supported_text}; install such a {engine.name}"
    return Finding(engine.name, str(engine.version()), problem)


def hook_findings(engine: Engine, hooks: Iterable[Hook], package: str, group: str, left_out: str) -> list[Finding]:
    """One for each hook that every process needs. package: ours; group: the engine's entry points of plugins;
    left_out: why the engine would not have loaded ours, if it is known."""
    points = [point.value for point in importlib.metadata.entry_points(group=group)]
    if f"{package}:register" not in points:
        left_out = "longcat-serving is not installed in this environment; run pip install longcat-serving"
    findings = []
    for hook in of_stage(hooks, Stage.PROCESS):
        module, problem = hook.module(), ""
        if not module.startswith(package):
            failed = engine.failures.get(hook.name)
            problem = f"the hook failed: {failed}" if failed else left_out
            problem = problem or f"replaced by another plugin, or not applied; see the log of {engine.name}"
        findings.append(Finding(hook.name, module, problem))
    return findings


def checkpoint_findings(directory: Path) -> list[Finding]:
    """Of the checkpoint, and of its gate for drafts, if it has one."""
    from longcat_core.drafting import gate as drafting  # needs torch, without which the command line starts
    from longcat_core.weights import checkpoint

    try:
        config = checkpoint.read_config(directory)
        checkpoint.verify(directory, config)
    except ValueError as error:
        return [Finding("checkpoint", str(directory), str(error))]
    found = [Finding("checkpoint", f"{directory}: {config.total_parameters / 1e6:,.0f} M parameters, complete")]
    try:
        gate = drafting.load(directory)
    except ValueError as error:
        return [*found, Finding("draft gate", str(directory / drafting.GATE_FILE), str(error))]
    if gate is not None:
        found.append(
            Finding(
                "draft gate",
                f"prunes drafts with a score under {gate.threshold:g}, where a server is asked to use it",
            )
        )
    return found
