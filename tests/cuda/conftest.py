"""Dry runs, many in one process: the deployments that the tests of a session name, by machine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longcat_core.null_gpu.process import run
from longcat_core.planning import hardware
from longcat_core.planning.dry_run import Report
from tests.cuda.deployments import Deployment, write_models

Reports = Callable[[Deployment], Report]


def named_by(item: pytest.Item) -> Iterator[Deployment]:
    """The deployments that a test is about: a mark's, and its parameters."""
    for mark in item.iter_markers("deployments"):
        yield from mark.args
    if hasattr(item, "callspec"):
        yield from (value for value in item.callspec.params.values() if isinstance(value, Deployment))


@pytest.fixture(scope="session")
def report_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Build, once a session, every deployment of a machine that the collected tests name."""
    models: Path = tmp_path_factory.mktemp("models")
    write_models(models)
    named = dict.fromkeys(each for item in request.session.items for each in named_by(item))
    reports: dict[Deployment, Report] = {}

    def report_of(deployment: Deployment) -> Report:
        assert deployment in named, f"{deployment} is not named by the test"
        if deployment not in reports:
            machine, package = deployment.machine, deployment.package
            same = [each for each in named if (each.machine, each.package) == (machine, package)]
            found = run(package, [each.request(models) for each in same], hardware.machine(machine))
            reports.update(zip(same, found, strict=True))
        return reports[deployment]

    return report_of


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deployments(*deployments): which a test looks at")
