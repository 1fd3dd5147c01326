"""The example for Grafana: its files fit together, and listen on this machine only. Its queries: `tests/engines`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.exposition import generate_latest

from tests.prometheus import EXAMPLE


def test_the_example_listens_on_this_machine_only_and_has_its_files() -> None:
    services = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    (source,) = yaml.safe_load((EXAMPLE / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((EXAMPLE / "provisioning/dashboards/longcat.yaml").read_text())["providers"]
    grafana = services["grafana"]["environment"]
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    assert source["url"].startswith("http://127.0.0.1:")
    assert grafana["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    mounted = [volume.split(":") for service in services.values() for volume in service["volumes"]]
    assert all((EXAMPLE / here).exists() for here, _, _ in mounted)
    places = {there: EXAMPLE / here for here, there, _ in mounted}
    dashboard = Path(grafana["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(dashboard.parent) == provider["options"]["path"]
    assert (places[str(dashboard.parent)] / dashboard.name).exists()


def test_prometheus_client_still_writes_colons_as_underscores() -> None:
    """In OpenMetrics, as SGLang answers Prometheus 2. Once it does not, prometheus.yml need not mend it."""
    registry = CollectorRegistry()
    Counter("longcat:tokens", "Tokens.", registry=registry)
    assert "longcat_tokens_total 0.0" in generate_latest(registry).decode()
