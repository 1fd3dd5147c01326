"""docs/plan.md shows what its commands print, and the tables that the code gives."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re

import pytest

from docs import plan_examples


def test_examples_and_tables_are_what_the_code_gives() -> None:
    page = plan_examples.PAGE.read_text()
    assert plan_examples.written(page) == page, "run python -m docs.plan_examples"
    assert set(re.findall(r"<!-- (\w+) -->", page)) - {"end"} == plan_examples.TABLES.keys()
    assert page.count("$ longcat plan") > 8


def test_an_example_that_prints_something_else_is_found() -> None:
    page = (
        "```\n$ longcat plan chat --gpus 8xH200 --precision fp8 | grep -E 'tokens/s a GPU'\n tokens/s a GPU  1\n```\n"
    )
    assert plan_examples.written(page) != page


def test_only_two_filters_come_behind_a_bar() -> None:
    with pytest.raises(ValueError, match="wanted grep -E or head"):
        plan_examples.output("longcat plan chat | sort -n x")
