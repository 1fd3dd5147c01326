"""An engine as both engine packages see it: supported versions, hooks that failed, refusals of options."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from longcat_core import spellings
from longcat_core.plugin.hooks import Hook, Stage, expect_longcat, of_stage
from longcat_core.quantization import PUBLISHED_BLOCK

logger = logging.getLogger(__name__)


class UnsupportedEngineError(RuntimeError):
    """The version of the engine is not supported, or a hook could not be installed."""


@dataclass
class Engine:
    name: str
    """As its users write it."""
    distributions: tuple[str, ...]
    """Names of the distributions that install it, the usual one first."""
    supported: SpecifierSet
    supported_text: str
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be hooked in this process: the hook's name and the reason."""
    _is_left_alone: bool = False

    def version(self) -> Version:
        """The version that is installed.

        Raises:
            importlib.metadata.PackageNotFoundError: if none is.
        """
        for distribution in self.distributions[:-1]:
            try:
                return Version(importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                continue
        return Version(importlib.metadata.version(self.distributions[-1]))

    def is_supported(self) -> bool:
        """Whether the installed version is supported; False if none is installed."""
        try:
            return self.supported.contains(self.version(), prereleases=True)
        except (importlib.metadata.PackageNotFoundError, InvalidVersion):
            return False

    def install(self, hooks: Iterable[Hook], stage: Stage, device: str = "") -> None:
        """Install the hooks of a stage, with those for a type of device; none into an engine of another version, which
        is left as it is.

        Never raises: a broken hook must not take down another model's server, so its reason is logged once and kept
        for `require_supported`.
        """
        if not self.is_supported():
            self._say_that_it_is_left_alone()
            return
        if stage in (Stage.DEPLOYMENT, Stage.MODEL):
            expect_longcat()
        for hook in of_stage(hooks, stage, device):
            try:
                hook.install()
                self.failures.pop(hook.name, None)
            except Exception as error:
                if hook.name not in self.failures:
                    logger.warning("longcat-serving could not hook its %s into %s: %r", hook.name, self.name, error)
                self.failures[hook.name] = repr(error)

    def require_supported(self, hooks: Sequence[Hook], stage: Stage = Stage.PROCESS, device: str = "") -> None:
        """Check that the engine's version is supported, and that hooks are in place: those that every process needs,
        and those of a stage that has been installed, with those for a type of device.

        Called when a LongCat model is requested, so that other models are never disturbed.

        Raises:
            UnsupportedEngineError: naming what is wrong and what to do.
        """
        if not self.is_supported():
            raise UnsupportedEngineError(
                f"longcat-serving serves LongCat-Flash on {self.name} {self.supported_text}, found {self.version()}; "
                f"install such a {self.name}, or uninstall longcat-serving to get {self.name}'s own model"
            )
        failures = dict(self.failures)
        for hook in (*of_stage(hooks, Stage.PROCESS), *of_stage(hooks, stage, device)):
            if hook.name not in failures and not hook.module().startswith("longcat_"):
                failures[hook.name] = f"{hook.module()} is in its place"
        if failures:
            listed = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise UnsupportedEngineError(
                f"longcat-serving could not hook into {self.name} {self.version()}: {listed}; "
                f"run `longcat doctor`, and see the log of {self.name}"
            )

    def _say_that_it_is_left_alone(self) -> None:
        if not self._is_left_alone and multiprocessing.parent_process() is None:
            logger.warning(
                "longcat-serving is for %s %s, and changes nothing in this one: LongCat-Flash gets %s's own model, if "
                "it has one.",
                self.name,
                self.supported_text,
                self.name,
            )
        self._is_left_alone = True


def refuse(problems: Sequence[str]) -> None:
    """Raise ValueError with every problem of a deployment, each naming what to do, if there are any."""
    if problems:
        raise ValueError("LongCat-Flash cannot be served like this:\n  " + "\n  ".join(problems))


def unserved_quantization(method: str | None, hf_config: Any, any_block: bool) -> list[str]:
    """Why this package cannot serve a deployment's quantisation, each with the value met and the value wanted; empty
    if there is none, or the checkpoint's own FP8 in blocks.

    method: what the engine has made of the checkpoint and of --quantization; any_block: whether blocks of any size are
    served, because all weights can be dequantised.
    """
    if method is None:
        return []
    quantization = spellings.read(hf_config).quantization
    if quantization is None or quantization.method != "fp8" or method != "fp8":
        return [f"quantization: {method!r}, wanted none, or the 'fp8' of a checkpoint that is published in it"]
    problems = quantization.problems()
    if not any_block and quantization.block != PUBLISHED_BLOCK:
        problems.append(f"weight_block_size: {list(quantization.block)}, wanted {list(PUBLISHED_BLOCK)}")
    return [f"quantization_config.{problem}" for problem in problems]


def leave_to_own_class(engine: str, reasons: Sequence[str], lost: str, log: logging.Logger) -> None:
    """Warn that a LongCat model is left to the engine's own class, why, and what that lacks."""
    why = "; ".join(reasons)
    log.warning("LongCat-Flash is served by %s's own class: %s. It lacks: %s.", engine, why, lost)


def unsupported_cpu_cache(dtype: str) -> str:
    """The problem of a cache that a CPU's attention cannot read, to be told with `refuse`."""
    return f"kv_cache_dtype: {dtype!r}, wanted 'auto' on a CPU; leave --kv-cache-dtype out"
