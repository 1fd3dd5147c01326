"""vLLM engines for the tests, in this process: 2 s each, where an engine of processes of its own takes 20."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

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


@pytest.fixture(autouse=True)
def _engine_is_gone() -> Iterator[None]:
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.fixture
def two_ranks_on_few_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM binds each rank to cores of its own, and refuses when there are not enough."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
