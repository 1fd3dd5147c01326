"""What all tests have: checkpoints of the shared cases, each written once."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from longcat_core.drafting import gate as drafting
from tests.cases import Case, drafting_tensors, write_checkpoint
from tests.speculation import CASE, the_gate


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Write a case's checkpoint once a session."""

    @cache
    def directory_of(case: Case) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), case.config, case.published())

    return directory_of


@pytest.fixture(scope="session")
def drafting_checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Write a case's checkpoint whose drafts are partly accepted, once a session."""

    @cache
    def directory_of(case: Case) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("drafting"), case.config, drafting_tensors(case.config))

    return directory_of


@pytest.fixture(scope="session")
def gated_checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Write a case's checkpoint whose drafts are partly accepted, with a gate beside it, once a session."""

    @cache
    def directory_of(case: Case) -> Path:
        directory = tmp_path_factory.mktemp("gated")
        write_checkpoint(directory, case.config, drafting_tensors(case.config))
        drafting.save(the_gate(case), directory, drafting.fingerprint(directory, case.config))
        return directory

    return directory_of


@pytest.fixture
def gated(gated_checkpoint_of: Callable[[Case], Path]) -> Path:
    """The checkpoint of most tests of drafts, with its gate."""
    return gated_checkpoint_of(CASE)
