"""What is kept of a module's weights is made once, again when it is forgotten, and not used while somebody watches."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from longcat_core.plugin.kept import kept


class Module(nn.Module):
    compiled: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


@pytest.mark.parametrize("made", ["something", None])
def test_it_is_made_once_until_it_is_forgotten(made: str | None) -> None:
    module, asked = Module(), list[Any]()

    def make(of: Module) -> str | None:
        asked.append(of)
        return made

    assert [kept(module, make) for _ in range(3)] == [made] * 3
    assert asked == [module]
    module.compiled = None
    assert kept(module, make) == made
    assert asked == [module] * 2


def test_a_module_that_somebody_watches_is_called() -> None:
    module = Module()
    first = module.inner.register_forward_hook(lambda *_: None)
    assert kept(module, lambda _: "something") is None
    first.remove()
    every = nn.modules.module.register_module_forward_hook
    for register in (module.inner.register_forward_hook, module.register_forward_pre_hook, every):
        assert kept(module, lambda _: "something") == "something"
        handle = register(lambda *_: None)
        assert kept(module, lambda _: "something") is None
        handle.remove()
    assert kept(module, lambda _: "something") == "something"
