"""The table of hooks of each engine: what it names is there, and what is not LongCat's stays the engine's."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from typing import Any

import pytest

from longcat_core.plugin.hooks import Entry, Hook, Wrapper, guarded
from tests.harness import ENGINE, engine
from tests.plugin import python

HOOKS: tuple[Hook, ...] = import_module(f"{engine.PACKAGE}.hooks").HOOKS
WRAPPERS = [hook for hook in HOOKS if isinstance(hook, Wrapper) and not hook.concerns.endswith(":is_longcats_process")]
"""Those in processes of any model."""
LOAD_PLUGINS = {
    "vllm": "from vllm.plugins import load_general_plugins as load_plugins\n",
    "sglang": "from sglang.srt.plugins import load_plugins\n",
}[ENGINE]
"""What every process of the engine does."""
MODULES = f"""
import json
from longcat_core.plugin.hooks import Stage, of_stage
from {engine.PACKAGE}.hooks import HOOKS
print(json.dumps({{hook.name: hook.module() for hook in of_stage(HOOKS, Stage.PROCESS)}}))
"""


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_a_row_names_what_is_there_and_says_why(hook: Hook) -> None:
    assert hook.why
    assert hook.remove_when
    if isinstance(hook, Wrapper):
        assert callable(pkgutil.resolve_name(hook.target))
        assert all(callable(pkgutil.resolve_name(name)) for name in (hook.around, hook.concerns))
    else:
        assert isinstance(hook, Entry)
        assert all(callable(pkgutil.resolve_name(name)) for name in (hook.put, hook.found))


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_what_a_call_is_about_is_decided_where_a_longcat_is_recognised(hook: Hook) -> None:
    """By the model. Elsewhere it was decided by a tensor's device, which another model's has too."""
    if isinstance(hook, Wrapper):
        assert hook.concerns.startswith(f"{engine.PACKAGE}.engine:")


def test_names_of_hooks_are_unique() -> None:
    assert len({hook.name for hook in HOOKS}) == len(HOOKS)


def test_of_hooks_into_one_function_the_last_one_is_around_the_others() -> None:
    """As they are installed in the order of the table: a gate judges what chains draft, and penalties change what is
    sampled from."""
    inside = {"vllm": ["chains of drafts", "draft gate"], "sglang": ["sampled verification", "penalties of drafts"]}
    targets = [hook.target for hook in HOOKS]
    shared = [hook.name for hook in HOOKS if targets.count(hook.target) > 1]
    assert shared == inside[ENGINE]


def test_every_process_has_the_hooks_that_belong_there() -> None:
    modules = json.loads(python(LOAD_PLUGINS + "load_plugins()" + MODULES))
    assert modules
    assert all(module.startswith(engine.PACKAGE) for module in modules.values()), modules


@pytest.mark.parametrize("version", [engine.UNSUPPORTED[0], engine.UNSUPPORTED[-1]])
def test_an_engine_of_another_version_is_left_as_it_is(version: str) -> None:
    of_another_version = (
        "from packaging.version import Version\n"
        "from longcat_core.plugin.engine import Engine\n"
        f"Engine.version = lambda self: Version({version!r})\n"
    )
    modules = json.loads(python(of_another_version + LOAD_PLUGINS + "load_plugins()" + MODULES))
    assert not any(module.startswith("longcat_") for module in modules.values()), modules


class AnotherModel:
    """Whatever an engine of another version, or another model, may hand to what we have hooked."""


@pytest.mark.parametrize("hook", WRAPPERS, ids=lambda hook: hook.name)
@pytest.mark.parametrize("kwargs", [{}, {"a_new_option": 1}], ids=["positional", "named"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_a_call_about_another_model_reaches_the_engine_as_it_came(
    count: int, kwargs: dict[str, Any], hook: Wrapper
) -> None:
    args, seen = tuple(AnotherModel() for _ in range(count)), []
    served = object()

    def original(*given: Any, **named: Any) -> object:
        seen.append((given, named))
        return served

    assert guarded(hook.name, hook.around, hook.concerns)(original, *args, **kwargs) is served
    assert seen == [(args, kwargs)]
