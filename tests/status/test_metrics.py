"""
The alert rules and the dashboard, asked of a real Prometheus that scrapes a real server.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.applications import ECHO
from support.clients import free_port
from support.patience import PATIENCE
from support.programs import require_program, running

from connlimit import Limiter
from connlimit._limiter.slots import NullConnection

pytest.importorskip("prometheus_client")

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
RULES = EXAMPLES / "prometheus-alerts.yml"
DASHBOARD = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """
    The URL of a Prometheus that has scraped a busy server for some seconds.
    """
    program, folder = require_program("prometheus"), tmp_path_factory.mktemp("prometheus")
    status, own = free_port(), free_port()
    (folder / "echoes.py").write_text(ECHO)
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 250ms}\n"
        f"scrape_configs: [{{job_name: c, static_configs: [{{targets: ['127.0.0.1:{status}']}}]}}]\n"
    )
    command = ["--listen=tcp:0:interface=127.0.0.1", f"--status=tcp:{status}:interface=127.0.0.1"]
    command += ["--factory=echoes:factory", "--max-connections=1", "--max-waiting=1", "--name=main"]
    with running("connlimit", *command, cwd=folder) as server:
        port = int(server.wait_for(r"Factory starting on (\d+)")[1])
        scraping = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{own}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{own}"
            began = time.monotonic()
            while not query(
                url, "connlimit_wait_seconds_count > 20 and rate(connlimit_finished_total[1m]) > 0"
            ):
                assert time.monotonic() - began < PATIENCE
                clients = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(3)]
                time.sleep(0.02)
                for client in clients:
                    client.close()
            yield url
        finally:
            scraping.terminate()
            scraping.wait(PATIENCE)


def query(url: str, expression: str) -> list[object]:
    """
    What Prometheus answers; nothing while it is not ready.
    """
    asked = f"{url}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            return json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
    except urllib.error.URLError:  # it does not listen yet
        pass
    return []


def test_the_rules_are_right() -> None:
    done = subprocess.run([require_program("promtool"), "check", "rules", str(RULES)], capture_output=True)
    assert done.returncode == 0, done.stdout


def conditions() -> list[str]:
    return [line.split("expr: ")[1] for line in RULES.read_text().splitlines() if "expr: " in line]


@pytest.mark.parametrize("expression", conditions())
def test_each_alert_asks_for_something_that_is_there(expression: str, prometheus: str) -> None:
    query(prometheus, expression)
    asked = expression.replace(" >= on (limiter) group_left", " + on (limiter) group_left")
    assert query(prometheus, asked.rpartition(" > ")[0] or asked)


@pytest.mark.parametrize(
    "expression", [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
)
def test_each_panel_shows_something(expression: str, prometheus: str) -> None:
    assert query(prometheus, expression.replace("$__rate_interval", "1m"))


def test_a_registry_of_ones_own_has_the_metrics_of_a_limiter() -> None:
    from prometheus_client import CollectorRegistry

    from connlimit.metrics import LimiterCollector, Watch

    limiter, registry = Limiter(3, name="web"), CollectorRegistry()
    registry.register(LimiterCollector([Watch(limiter)]))
    served = NullConnection(None)
    limiter.admission.serve_at_once(served)
    assert registry.get_sample_value("connlimit_connections", {"limiter": "web", "state": "active"}) == 1
    assert registry.get_sample_value("connlimit_max_connections", {"limiter": "web"}) == 3
    assert registry.get_sample_value("connlimit_max_waiting", {"limiter": "web"}) == math.inf
    assert registry.get_sample_value("connlimit_accepted_total", {"limiter": "web"}) == 1
    assert registry.get_sample_value("connlimit_refused_total", {"limiter": "web", "reason": "full"}) == 0
    assert registry.get_sample_value("connlimit_draining", {"limiter": "web"}) == 0
    assert registry.get_sample_value("connlimit_backlog", {"limiter": "web"}) is None
