"""The rows of each engine's table of options, for a reader who looks at the second column alone."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from importlib import import_module

import pytest

from longcat_core.plugin.options import Option, Outcome
from tests.harness import engine

OPTIONS: tuple[Option, ...] = import_module(f"{engine.PACKAGE}.options").OPTIONS
REFUSED = [option for option in OPTIONS if option.outcome in (Outcome.REFUSED, Outcome.OWN_CLASS)]
CONDITION = re.compile(r"\b(served|if|unless|where it)\b|\bon a [CG]PU\b|\bwith(out)? drafts\b", re.IGNORECASE)
"""What is said of an option that is served with other values, or in other deployments."""


def test_an_option_has_one_row() -> None:
    assert len({option.flag for option in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("option", REFUSED, ids=lambda option: option.flag)
def test_an_option_that_is_refused_is_never_served(option: Option) -> None:
    """Else a reader learns that LongCat has none of it, as no data parallelism."""
    assert CONDITION.search(option.why) is None
