"""The pages of the documentation that come from data say what the data say."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from docs.tables import FOLDER, pages


@pytest.mark.parametrize("name", pages())
def test_a_page_that_comes_from_data_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == pages()[name], "run `python -m docs.tables` in this engine's environment"
