"""Options of a server of another kind, or of no model at all, meet what they would meet without us."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import SimpleNamespace

import pytest

from longcat_sglang import registration
from tests.plugin import save_llama
from tests.sglang.engine import configure


def test_a_server_of_embeddings_is_configured_as_without_us(tmp_path: Path) -> None:
    assert configure(save_llama(tmp_path), is_embedding=True) is None


@pytest.mark.parametrize("content", [None, "[]", "{", '{"_class_name": "FluxPipeline"}'])
def test_a_path_that_is_no_language_model_is_no_error_of_ours(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert raised_in(lambda: configure(tmp_path)).partition("_")[0] != "longcat"


def raised_in(call: Callable[[], object]) -> str:
    """The module that an error comes from; empty if there is none."""
    try:
        call()
    except Exception as error:
        return str([frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)][-1])
    return ""


def test_options_without_a_model_are_no_longcats() -> None:
    assert not registration._serves_longcat(SimpleNamespace())
