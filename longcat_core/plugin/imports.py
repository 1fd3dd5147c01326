"""What is done when a module of an engine is imported, which may be later, or never."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)


def when_imported(module: str, do: Callable[[], None]) -> None:
    """Do something as soon as a module has been imported: now, if it has been. Harmless when called again.

    What it raises later is logged, and does not make the import fail, which may be another model's.
    """
    if module in sys.modules:
        do()
        return
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)
    waiting = _WAITING.for_modules.setdefault(module, [])
    if do not in waiting:
        waiting.append(do)


def is_awaited(module: str) -> bool:
    """Whether a module is not imported, and something is done when it is."""
    return module not in sys.modules and _WAITING in sys.meta_path and module in _WAITING.for_modules


class _Waiting(MetaPathFinder):
    """Finds modules as the importers behind it do, and adds what is done to their execution."""

    def __init__(self) -> None:
        self.for_modules: dict[str, list[Callable[[], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.for_modules:
            return None
        # Only those behind it: one before it may ask it in turn, as another plugin's of this kind does.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)  # Python passes over finders without it, too
            spec = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                self._extend(spec)
                return spec
        return None

    def _extend(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def execute_and_do(module: ModuleType) -> None:
            execute(module)
            for do in self.for_modules[spec.name]:
                try:
                    do()
                except Exception:
                    logger.exception("longcat-serving could not change %s", spec.name)

        loader.exec_module = execute_and_do  # type: ignore[method-assign]


_WAITING = _Waiting()
