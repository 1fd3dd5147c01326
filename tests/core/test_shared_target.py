"""The target that processes of a server have in common."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from longcat_core.observation import shared_target


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared_target.FILE, "")
    monkeypatch.setattr(shared_target, "_made", None)


def test_what_was_written_last_is_read() -> None:
    shared_target.settle(has_dial=True)
    assert shared_target.read() is None
    for target in (2.5, 7.125):
        shared_target.write(target)
        assert shared_target.read() == target


def test_without_a_dial_nothing_is_read_and_written() -> None:
    """Whatever the process that has started this one shares."""
    os.environ[shared_target.FILE] = __file__
    shared_target.settle(has_dial=False)
    shared_target.write(2.5)
    assert shared_target.read() is None
    assert shared_target.FILE not in os.environ


def test_on_another_machine_nothing_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared_target.FILE, str(tmp_path / "elsewhere"))
    shared_target.write(2.5)
    assert shared_target.read() is None
    assert list(tmp_path.iterdir()) == []


def rank() -> None:
    shared_target.settle(has_dial=True)
    shared_target.write(2.5)


def test_a_process_that_a_server_starts_writes_into_the_servers_file() -> None:
    shared_target.settle(has_dial=True)
    file = os.environ[shared_target.FILE]
    shared_target.settle(has_dial=True)
    assert os.environ[shared_target.FILE] == file, "options may be read twice"
    process = multiprocessing.get_context("spawn").Process(target=rank)
    process.start()
    process.join(60)
    assert shared_target.read() == 2.5
