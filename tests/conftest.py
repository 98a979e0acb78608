"""
Fixtures for all tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.applications import Running
from support.guarantees import promises
from support.programs import require_program, running
from support.redis import Redis
from support.tls import make_certificate


def pytest_addoption(parser: pytest.Parser) -> None:
    """
    Let the tests be chosen by what they hold.
    """
    parser.addoption(
        "--guarantee",
        action="append",
        default=[],
        metavar="R7",
        help="run the tests that hold this promise of docs/guarantees.rst; can be given several times",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Run the tests that were asked for.
    """
    wanted = config.getoption("guarantee")
    if not wanted:
        return
    held = promises()
    for each in wanted:
        if each not in held:
            raise pytest.UsageError(f"--guarantee must be one of {', '.join(held)}, not {each}")
    names = {name for each in wanted for name in held[each]}
    chosen = [item for item in items if names & {item.name.partition("[")[0], *item.listnames()}]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


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
