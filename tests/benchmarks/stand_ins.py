"""Processes in the place of a stage's, for the tests of `benchmarks.gpu.measure`: no torch, so they start at once."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Connection

CASES = [{"n": n} for n in range(4)]


def _send(rows: Connection, done: frozenset[str], at_most: int) -> None:
    rows.send({"device": "stand-in"})
    left = [case for case in CASES if json.dumps(case, sort_keys=True) not in done]
    for case in left[:at_most]:
        rows.send({"case": case, "result": {"us": 1.0}})


def hangs_after_two(name: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    os.setsid()
    _send(rows, done, 2)
    time.sleep(600)


def dies_after_one(name: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    """So a stage of four needs four processes, and a fifth that is complete."""
    os.setsid()
    _send(rows, done, 1)
    if len(done) < len(CASES):
        os._exit(1)
    rows.send({"complete": True})


def device_fails(name: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    os.setsid()
    if name == "device":
        rows.send({"failed": "ValueError: no such thing"})
        return
    _send(rows, done, 4)
    rows.send({"complete": True})


def is_elsewhere(name: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    os.setsid()
    rows.send({"device": "another"})
    rows.send({"complete": True})


def misses_the_last(name: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    os.setsid()
    _send(rows, done, 3)
    rows.send({"case": CASES[3], "missing": "vLLM"})
    rows.send({"complete": True})
