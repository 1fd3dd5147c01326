"""What is done when a module is imported: once, behind its execution, and without harm to the import."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from longcat_core.plugin.imports import is_awaited, when_imported

NAME = "imported_some_time"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{NAME}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop(NAME, None)
    for finder in sys.meta_path:
        getattr(finder, "for_modules", {}).pop(NAME, None)


def change() -> None:
    sys.modules[NAME].value += 1  # type: ignore[attr-defined]


def imported() -> Any:
    return importlib.import_module(NAME)


def test_it_is_done_once_when_the_module_is_imported() -> None:
    when_imported(NAME, change)
    when_imported(NAME, change)
    assert is_awaited(NAME)
    assert imported().value == 2
    assert not is_awaited(NAME)


def test_it_is_done_at_once_to_a_module_that_is_there() -> None:
    assert imported().value == 1
    when_imported(NAME, change)
    assert imported().value == 2


def test_a_module_is_imported_whatever_goes_wrong() -> None:
    def fail() -> None:
        raise RuntimeError("no such table")

    when_imported(NAME, fail)
    assert imported().value == 1


class AsksAllOthers:
    """Another plugin's finder, before ours."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        return next((spec for spec in found if spec is not None), None)


def test_a_finder_that_asks_ours_is_not_asked_in_turn() -> None:
    when_imported(NAME, change)
    sys.meta_path.insert(0, AsksAllOthers())  # type: ignore[arg-type]
    assert imported().value == 2


def test_a_finder_without_find_spec_is_passed_over() -> None:
    when_imported(NAME, change)
    sys.meta_path.insert(1, object())  # type: ignore[arg-type]
    assert imported().value == 2
