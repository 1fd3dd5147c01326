"""An engine as both engine packages see it: versions, what could not be hooked into it, what it cannot be asked for."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet
from packaging.version import Version

logger = logging.getLogger(__name__)


class UnsupportedEngineError(RuntimeError):
    """The engine is not a version that its package knows, or does not have what is hooked into it."""


@dataclass
class Engine:
    name: str
    """As its users write it."""
    distributions: tuple[str, ...]
    """Names under which it is installed, the usual one first."""
    supported: SpecifierSet
    supported_text: str
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be hooked in this process: the hook's name and the reason."""

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
        return self.supported.contains(self.version(), prereleases=True)

    def hook(self, name: str, install: Callable[[], None]) -> None:
        """Call `install`. Never raises: a broken hook must not take down another model's server, so its reason is
        logged once and kept for `require_supported`."""
        try:
            install()
            self.failures.pop(name, None)
        except Exception as error:
            if name not in self.failures:
                logger.warning("longcat-serving could not hook its %s into %s: %r", name, self.name, error)
            self.failures[name] = repr(error)

    def require_supported(self) -> None:
        """Called when a LongCat model is asked for, so that another model is never disturbed.

        Raises:
            UnsupportedEngineError: naming what is wrong and what to do.
        """
        version = self.version()
        if not self.is_supported():
            raise UnsupportedEngineError(
                f"longcat-serving serves LongCat-Flash on {self.name} {self.supported_text}, found {version}; "
                f"install such a {self.name}, or uninstall longcat-serving to get {self.name}'s own model"
            )
        if self.failures:
            failures = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
            raise UnsupportedEngineError(f"longcat-serving could not hook into {self.name} {version}: {failures}")


def refuse(problems: Sequence[str]) -> None:
    """Raise ValueError with every problem of a deployment, each naming what to do, if there are any."""
    if problems:
        raise ValueError("LongCat-Flash cannot be served like this:\n  " + "\n  ".join(problems))


def unsupported_quantization(method: str) -> str:
    """The problem of a checkpoint or an option that asks for quantisation, to be told with `refuse`."""
    return (
        f"quantization: {method!r}, wanted none so far; give a bfloat16 or float32 checkpoint, "
        "and leave --quantization out"
    )


def unsupported_cpu_cache(dtype: str) -> str:
    """The problem of a cache that a CPU's attention cannot read, to be told with `refuse`."""
    return f"kv_cache_dtype: {dtype!r}, wanted 'auto' on a CPU; leave --kv-cache-dtype out"


def tell_of_gate(threshold: float, obstacles: Sequence[str], log: logging.Logger) -> None:
    """Say in the engine's log whether a checkpoint's draft gate is used, or what is in its way."""
    if obstacles:
        log.warning("The checkpoint's draft gate is not used, and all drafts are verified: %s", "; ".join(obstacles))
    else:
        log.info("The checkpoint's draft gate holds back drafts with a score under %g.", threshold)
