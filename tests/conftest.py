"""
Fixtures for all tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.applications import Running
from support.programs import require_program, running
from support.redis import Redis
from support.tls import make_certificate


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """
    A file with a private key and its certificate for localhost.
    """
    return make_certificate(tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """
    A real browser.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = require_program("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(require_program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """
    A Redis that has been up for a while.
    """
    running = Redis(tmp_path_factory.mktemp("redis")).start()
    yield running
    running.stop()


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Running]:
    """
    A running program with one limiter of two slots, and one service.
    """
    it = Running(tmp_path)
    it.write("[limiters.main]\nmax_connections = 2\n" + it.service())
    with running("connlimit", "--config", str(it.path), cwd=tmp_path) as program:
        it.program = program
        program.wait_for("2 served at once")
        yield it
    for client in it.clients:
        client.close()
