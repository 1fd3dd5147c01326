"""Where SGLang's options leave no mean to be held; `engines/test_dial.py` has what a dial does."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longcat_sglang import dial
from tests.cases import DEFAULT


@pytest.mark.parametrize(
    ("given", "obstacle"),
    [
        ({"enable_dp_attention": True}, "--enable-dp-attention is given, and ranks with other tokens would turn their"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend is given, and ranks with other tokens would turn their"),
        ({"enable_memory_saver": True}, "with --enable-memory-saver its memory comes and goes"),
    ],
)
def test_ranks_with_other_tokens_and_memory_that_comes_and_goes_have_no_dial(
    given: dict[str, Any], obstacle: str
) -> None:
    settings = SimpleNamespace(enable_dp_attention=False, moe_a2a_backend="none", enable_memory_saver=False)
    assert dial.obstacles(settings, DEFAULT, 2.5) == []
    vars(settings).update(given)
    (found,) = dial.obstacles(settings, DEFAULT, 2.5)
    assert found.startswith(obstacle)
