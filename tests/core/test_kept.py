"""What is kept of a module's weights is made once, and again when it is forgotten."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longcat_core.plugin.kept import kept


@pytest.mark.parametrize("made", ["something", None])
def test_it_is_made_once_until_it_is_forgotten(made: str | None) -> None:
    module, asked = SimpleNamespace(compiled=None), list[Any]()

    def make(of: Any) -> str | None:
        asked.append(of)
        return made

    assert [kept(module, make) for _ in range(3)] == [made] * 3
    assert asked == [module]
    module.compiled = None
    assert kept(module, make) == made
    assert asked == [module] * 2
