"""The target that processes of a server have in common."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import multiprocessing
import os
import tempfile
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
    """Also where this process was started by one that has a dial."""
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


def test_what_cannot_be_written_or_read_ends_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, link, short = tmp_path / "pipe", tmp_path / "link", tmp_path / "short"
    os.mkfifo(pipe)
    short.write_bytes(b"abc")
    link.symlink_to(short)
    for place in (tmp_path, pipe, link):
        monkeypatch.setenv(shared_target.FILE, str(place))
        shared_target.write(2.5)
        assert shared_target.read() is None
    assert short.read_bytes() == b"abc"
    monkeypatch.setenv(shared_target.FILE, str(short))
    assert shared_target.read() is None


def test_without_a_place_for_the_file_responses_name_no_target(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def is_full(**_: object) -> tuple[int, str]:
        raise OSError("no space")

    monkeypatch.setattr(tempfile, "mkstemp", is_full)
    shared_target.settle(has_dial=True)
    assert shared_target.FILE not in os.environ
    assert "no space" in caplog.text


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
