"""The name of the engine in every test's, so that a failure says which one it is of."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from tests.harness import ENGINE


@pytest.fixture(scope="session", autouse=True, params=[ENGINE])
def engine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
