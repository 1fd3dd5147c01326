"""One thread: the models here are so small that more only wait for each other."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.threads import threads


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
