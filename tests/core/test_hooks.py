"""Hooks: a wrapper is called for LongCat models alone, and everything else reaches the engine as it came."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from longcat_core.plugin import hooks
from longcat_core.plugin.engine import Engine, UnsupportedEngineError
from longcat_core.plugin.hooks import Around, Entry, Stage, Wrapper, guarded, module_of_attribute, table, wrap_attribute

OURS = f"{__name__}:negate"


def negate(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    return -original(*args, **kwargs)


def is_for_longcat(model: Any, *_: Any, **__: Any) -> bool:
    return bool(model.name == "longcat")


class Model:
    def __init__(self, name: str) -> None:
        self.name = name


class Runner:
    name = "another"

    def run(self, value: int) -> int:
        return value

    @classmethod
    def of_class(cls, value: int) -> int:
        return value

    @staticmethod
    def of_none(value: int) -> int:
        return value


class LongcatRunner(Runner):
    name = "longcat"


@pytest.fixture
def engine_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of an engine, with classes and a function to be hooked."""
    module = ModuleType("an_engine")
    for each in (Runner, LongcatRunner):
        setattr(module, each.__name__, type(each.__name__, each.__bases__, dict(vars(each))))
    module.LongcatRunner = type("LongcatRunner", (module.Runner,), {"name": "longcat"})  # type: ignore[attr-defined]
    module.function = lambda model, value=0: value  # type: ignore[attr-defined]
    module.table = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "an_engine", module)
    return module


def around() -> Around:
    return guarded("negation", OURS, f"{__name__}:is_for_longcat")


def test_a_call_about_a_longcat_is_wrapped_and_any_other_is_not(engine_module: ModuleType) -> None:
    wrap_attribute("an_engine.function", around())
    assert engine_module.function(Model("longcat"), 3) == -3
    assert engine_module.function(Model("llama"), 3) == 3


@pytest.mark.parametrize("args", [(), (None,), (object(), 1), (Model("llama"), 1, 2, 3)], ids=len)
@pytest.mark.parametrize("kwargs", [{}, {"option": 1}], ids=len)
def test_a_call_that_makes_no_sense_to_us_reaches_the_original_as_it_came(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    seen = []

    def original(*given: Any, **named: Any) -> str:
        seen.append((given, named))
        return "served"

    assert around()(original, *args, **kwargs) == "served"
    assert seen == [(args, kwargs)]


@pytest.mark.parametrize("method", ["run", "of_class"])
def test_methods_stay_what_they_are_for_a_class_and_its_subclasses(method: str, engine_module: ModuleType) -> None:
    wrap_attribute(f"an_engine.Runner.{method}", around())
    assert getattr(engine_module.LongcatRunner(), method)(3) == -3
    assert getattr(engine_module.Runner(), method)(3) == 3


def test_a_static_method_stays_one(engine_module: ModuleType) -> None:
    wrap_attribute("an_engine.Runner.of_none", around())
    assert engine_module.Runner().of_none(3) == 3


def test_wrapping_again_changes_nothing_also_under_another_plugins_wrapper(engine_module: ModuleType) -> None:
    wrap_attribute("an_engine.function", around())
    ours = engine_module.function
    wrap_attribute("an_engine.function", around())
    assert engine_module.function is ours

    def others(*args: Any, **kwargs: Any) -> int:
        return ours(*args, **kwargs)

    others.__wrapped__ = ours  # type: ignore[attr-defined]
    engine_module.function = others  # type: ignore[attr-defined]
    wrap_attribute("an_engine.function", around())
    assert engine_module.function is others
    assert module_of_attribute("an_engine.function") == __name__


# -- an engine's table ---------------------------------------------------------------------------------


def an_engine(version: str | None = "1.5") -> Engine:
    engine = Engine("An engine", ("an-engine",), SpecifierSet(">=1,<2"), "1")
    if version is not None:
        engine.version = lambda: Version(version)  # type: ignore[method-assign]
    return engine


def put() -> None:
    sys.modules["an_engine"].table["ours"] = __name__


def found() -> str:
    return "longcat_core" if "ours" in sys.modules["an_engine"].table else "none"


ENTRY = Entry(
    name="entry", target="an_engine.table", put=f"{__name__}:put", found=f"{__name__}:found", why="", remove_when=""
)
BROKEN = Entry(name="broken", target="", put=f"{__name__}:nothing", found=f"{__name__}:found", why="", remove_when="")
LATER = Wrapper(
    name="later",
    target="an_engine.function",
    around=OURS,
    concerns=f"{__name__}:is_for_longcat",
    why="It is\nneeded.",
    remove_when="Never.",
    stage=Stage.MODEL,
    device="cpu",
)


def test_hooks_are_installed_at_their_stage_and_on_their_device(engine_module: ModuleType) -> None:
    engine, before = an_engine(), engine_module.function
    engine.install((ENTRY, LATER), Stage.PROCESS, "cpu")
    assert engine_module.function is before
    engine.install((ENTRY, LATER), Stage.MODEL, "cuda")
    assert engine_module.function is before
    engine.install((ENTRY, LATER), Stage.MODEL, "cpu")
    assert engine_module.function is not before
    engine.require_supported((ENTRY, LATER))


@pytest.mark.parametrize("version", ["2.0", "0.9", None])
def test_an_engine_of_another_version_or_of_none_gets_no_hook(
    version: str | None, engine_module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    engine, before = an_engine(version), engine_module.function
    for stage in Stage:
        engine.install((ENTRY, LATER), stage, "cpu")
    assert engine_module.table == {}
    assert engine_module.function is before
    assert caplog.text.count("changes nothing in this one") == 1


def test_a_hook_that_fails_is_logged_once_and_an_error_when_a_longcat_is_asked_for(
    engine_module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    engine = an_engine()
    for _ in range(2):
        engine.install((BROKEN, ENTRY), Stage.PROCESS)
    assert caplog.text.count("could not hook its broken into An engine") == 1
    with pytest.raises(UnsupportedEngineError, match=r"could not hook into An engine 1\.5: broken: AttributeError"):
        engine.require_supported((BROKEN, ENTRY))


def test_a_hook_that_is_no_longer_in_place_is_an_error_when_a_longcat_is_asked_for(engine_module: ModuleType) -> None:
    engine = an_engine()
    engine.install((ENTRY,), Stage.PROCESS)
    engine_module.table.clear()
    with pytest.raises(UnsupportedEngineError, match="entry: none is in its place"):
        engine.require_supported((ENTRY,))


def test_a_hook_of_a_later_stage_is_asked_for_with_its_stage_and_device(engine_module: ModuleType) -> None:
    engine = an_engine()
    engine.install((ENTRY, LATER), Stage.PROCESS)
    engine.require_supported((ENTRY, LATER))
    engine.require_supported((ENTRY, LATER), Stage.MODEL, "cuda")
    with pytest.raises(UnsupportedEngineError, match=r"later: .* is in its place"):
        engine.require_supported((ENTRY, LATER), Stage.MODEL, "cpu")


def test_a_hook_that_cannot_tell_what_a_call_is_about_is_logged_once_where_a_longcat_is_served(
    engine_module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where an engine has renamed what it looks at. Of another model's process that says nothing."""
    monkeypatch.setattr(hooks, "_failed", None)
    LATER.install()
    renamed = SimpleNamespace(model_name="longcat")
    assert engine_module.function(renamed, 3) == 3
    an_engine().install((LATER,), Stage.PROCESS, "cpu")
    assert engine_module.function(renamed, 3) == 3
    assert caplog.text == ""
    an_engine().install((LATER,), Stage.MODEL, "cpu")
    assert [engine_module.function(renamed, 3) for _ in range(2)] == [3, 3]
    assert engine_module.function(Model("llama"), 3) == 3
    assert caplog.text.count("cannot tell whether a call is about LongCat-Flash") == 1
    assert "without the hook later: AttributeError(" in caplog.text


def test_the_table_for_the_documentation_has_a_row_for_each_hook() -> None:
    heading, _, *rows = table((ENTRY, LATER)).splitlines()
    assert heading.count("|") == 7
    when = "a LongCat model is built in this process, on a CPU"
    assert rows[1] == f"| later | `an_engine.function` | {when} | It is needed. | Never. |  |"
