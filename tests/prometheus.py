"""A real Prometheus that scrapes a server by the example's configuration, and what the example's dashboard asks it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from tests.server import Server, free_port, started, tail

EXAMPLE = Path(__file__).parents[1] / "examples" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((EXAMPLE / "dashboards" / "longcat.json").read_text())
PROGRAM = "prometheus"
needs_prometheus = pytest.mark.skipif(
    shutil.which(PROGRAM) is None,
    reason="there is no Prometheus; install Debian's package `prometheus`, as .ci/run does",
)
START_TIMEOUT_S = 60
SCRAPE_INTERVAL = "1s"


class Query(NamedTuple):
    """One of a panel's."""

    panel: str
    legend: str
    expression: str
    """With Grafana's variables filled in."""


class Series(NamedTuple):
    labels: dict[str, str]
    points: list[tuple[float, float]]
    """Seconds since 1970, and the value."""


def queries(rate_interval: str) -> list[Query]:
    """All of the dashboard's, in its order, of all models and layers. rate_interval: over which rates are taken."""
    variables = {"__rate_interval": rate_interval, "model": ".*", "layer": ".*"}
    return [
        Query(panel["title"], target["legendFormat"], re.sub(r"\$(\w+)", lambda v: variables[v[1]], target["expr"]))
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


class Prometheus:
    """Asked over its HTTP API."""

    moment: float | None = None
    """Of which it is asked, a time of `time.time()`, so that answers agree; now, if there is none."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, expression: str) -> list[Series]:
        moment = time.time() if self.moment is None else self.moment
        found = self._get("query", query=expression, time=moment)["result"]
        return [Series(each["metric"], [_point(each["value"])]) for each in found]

    def ask_range(self, expression: str, seconds: float, step: float = 1) -> list[Series]:
        """From `seconds` ago to now."""
        now = time.time()
        found = self._get("query_range", query=expression, start=now - seconds, end=now, step=step)["result"]
        return [Series(each["metric"], [_point(value) for value in each["values"]]) for each in found]

    def label_values(self, label: str, selector: str) -> list[str]:
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": selector})
        return values

    def _get(self, path: str, **parameters: str | float) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]


def _point(pair: tuple[float, str]) -> tuple[float, float]:
    return pair[0], float(pair[1])


@contextmanager
def scraping(server: Server, directory: Path) -> Iterator[Prometheus]:
    """Prometheus, which has scraped the server at least once, and scrapes it every second. It keeps its data in
    `directory`, and is gone afterwards.

    Raises:
        FileNotFoundError: if it is not installed.
        RuntimeError: with the end of its log, if it ends or has not scraped the server in time.
    """
    configuration = yaml.safe_load((EXAMPLE / "prometheus.yml").read_text())
    configuration["global"]["scrape_interval"] = SCRAPE_INTERVAL
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.http.base_url.port}"]}]
    file, log, address = directory / "prometheus.yml", directory / "prometheus.log", f"127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump(configuration))
    flags = [f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address={address}"]
    http = httpx.Client(base_url=f"http://{address}", trust_env=False)
    with started([PROGRAM, *flags], log) as process, http:
        prometheus, deadline = Prometheus(http), time.monotonic() + START_TIMEOUT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus ended, or has scraped nothing after {START_TIMEOUT_S} s:\n{tail(log)}")
            with suppress(httpx.TransportError):
                is_ready = http.get("/-/ready").is_success
                if is_ready and [series.points[0][1] for series in prometheus.ask("up")] == [1]:
                    break
            time.sleep(0.2)
        yield prometheus
