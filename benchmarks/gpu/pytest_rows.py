"""A plugin of pytest that appends each test's outcome to a file when it ends, so that a suite can be cut off."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test, to the file that LONGCAT_PYTEST_ROWS names. Processes of pytest-xdist leave it to the first."""
    is_news = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
    if not is_news or "PYTEST_XDIST_WORKER" in os.environ:
        return
    result: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome == "failed":
        result["message"] = report.longreprtext[-2000:]
    row = {"case": {"test": report.nodeid}, "result": result}
    with Path(os.environ["LONGCAT_PYTEST_ROWS"]).open("a") as file:
        file.write(json.dumps(row) + "\n")
