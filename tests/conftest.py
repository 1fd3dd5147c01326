"""What all tests have: checkpoints of the shared cases, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases import Case, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Write a case's checkpoint once a session."""
    written: dict[Case, Path] = {}

    def directory_of(case: Case) -> Path:
        if case not in written:
            directory = tmp_path_factory.mktemp("checkpoint")
            written[case] = write_checkpoint(directory, case.config, case.published())
        return written[case]

    return directory_of
