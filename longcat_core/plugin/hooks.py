"""Hooks into an engine: rows of a table, each installed once, and harmless to every model that is not LongCat's."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

logger = logging.getLogger(__name__)

Around = Callable[..., Any]
"""(original, *args, **kwargs): what an engine gets in place of `original(*args, **kwargs)`."""


class Stage(Enum):
    """When a hook is installed."""

    PROCESS = "a process of the engine starts, whatever it serves"
    PARSER = "a parser of LongCat's is asked for"
    DEPLOYMENT = "a LongCat model is about to be served"
    DIAL = "a LongCat model with a dial is about to be served"
    MODEL = "a LongCat model is built in this process"


@dataclass(frozen=True, kw_only=True)
class Hook(ABC):
    """One change of an engine."""

    name: str
    """As errors and `longcat doctor` call it."""
    target: str
    """What is changed: a dotted name in the engine, or the table and the key in it."""
    why: str
    """What goes wrong without it, and where in the engine."""
    remove_when: str
    upstream: str = ""
    """The engine's issue or pull request, if there is one."""
    stage: Stage = Stage.PROCESS
    device: str = ""
    """The only type of device, as torch calls it, on which it is installed; any if it is empty."""

    @abstractmethod
    def install(self) -> None:
        """Harmless when called again."""

    @abstractmethod
    def module(self) -> str:
        """The module of what is in place now: ours once the hook is installed."""


@dataclass(frozen=True, kw_only=True)
class Entry(Hook):
    """An entry of ours in one of the engine's tables."""

    put: str
    """`module:function` that makes the entry."""
    found: str
    """`module:function` that returns the module of the current entry."""

    def install(self) -> None:
        pkgutil.resolve_name(self.put)()

    def module(self) -> str:
        module: str = pkgutil.resolve_name(self.found)()
        return module


@dataclass(frozen=True, kw_only=True)
class Wrapper(Hook):
    """A function or method of the engine that ours is called around, for LongCat models alone."""

    around: str
    """`module:function`, an `Around`; imported when it is first needed."""
    concerns: str
    """`module:function` of the call's arguments: whether it is about a LongCat model."""
    wrap: str = "longcat_core.plugin.hooks:wrap_attribute"
    """`module:function` (target, around) that puts the wrapper in place."""
    wrapped_by: str = "longcat_core.plugin.hooks:module_of_attribute"
    """`module:function` (target) that returns the module of what is in place."""

    def install(self) -> None:
        pkgutil.resolve_name(self.wrap)(self.target, guarded(self.name, self.around, self.concerns))

    def module(self) -> str:
        module: str = pkgutil.resolve_name(self.wrapped_by)(self.target)
        return module


@functools.cache
def guarded(name: str, around: str, concerns: str) -> Around:
    """`around` where `concerns` says that a call is about a LongCat model. Every other call reaches the original with
    exactly the arguments that it was made with, even where `concerns` fails on them.

    name: of the hook. The same names give the same function, by which an engine's registry knows it again.
    """

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not _is_true(name, concerns, args, kwargs):
            return original(*args, **kwargs)
        return _function(around)(original, *args, **kwargs)

    call.__module__ = around.partition(":")[0]
    return call


def _is_true(name: str, concerns: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return bool(_function(concerns)(*args, **kwargs))
    except Exception as error:  # it may be another model's call, made in whatever way
        _note_failure(name, error)
        return False


_failed: set[str] | None = None
"""Hooks that could not tell what a call is about, as was logged; None where no LongCat is served."""


def expect_longcat() -> None:
    """Have such failures logged, each hook's first. For processes that serve a LongCat: elsewhere they are another
    model's matter, and a hook that fails on it does what it should."""
    global _failed
    if _failed is None:
        _failed = set()


def _note_failure(name: str, error: Exception) -> None:
    if _failed is not None and name not in _failed:
        _failed.add(name)
        logger.warning(
            "longcat-serving cannot tell whether a call is about LongCat-Flash, and leaves it as it is without the "
            "hook %s: %r",
            name,
            error,
        )


def _function(name: str) -> Callable[..., Any]:
    """As `pkgutil.resolve_name`, which takes eight times as long: some are called many times a step."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(sys.modules[module], attribute)
    except (KeyError, AttributeError):  # not imported, or another thread is about it, for which this waits
        found = getattr(importlib.import_module(module), attribute)
    return found


def wrap_attribute(target: str, around: Around) -> None:
    """Replace a function of a module or a method of a class by one that calls `around`. Harmless when called again."""
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    given = inspect.getattr_static(owner, name)
    kind = type(given) if isinstance(given, (classmethod, staticmethod)) else None
    original = given.__func__ if kind else given
    if around in _arounds(original):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.longcat_around = around  # type: ignore[attr-defined]
    setattr(owner, name, kind(wrapped) if kind else wrapped)


def module_of_attribute(target: str) -> str:
    """The module of our wrapper, if a function or method has one, under whatever else is around it; else its own."""
    function = pkgutil.resolve_name(target)
    function = getattr(function, "__func__", function)
    return str(next(_arounds(function), function).__module__)


def _arounds(function: Any) -> Iterator[Around]:
    """Those that `wrap_attribute` has put around a function, the last one first."""
    while function is not None:
        if hasattr(function, "longcat_around"):
            yield function.longcat_around
        function = getattr(function, "__wrapped__", None)


def of_stage(hooks: Iterable[Hook], stage: Stage, device: str = "") -> list[Hook]:
    """Those that belong to a stage on a type of device."""
    return [hook for hook in hooks if hook.stage is stage and hook.device in ("", device)]


def table(hooks: Iterable[Hook]) -> str:
    """All rows as Markdown, for the documentation."""
    lines = ["| hook | what is changed | when | why | remove when | upstream |", "|---|---|---|---|---|---|"]
    for hook in hooks:
        when = hook.stage.value + (f", on a {hook.device.upper()}" if hook.device else "")
        cells = (hook.name, f"`{hook.target}`", when, hook.why, hook.remove_when, hook.upstream)
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
