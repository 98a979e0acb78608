"""
Fixtures for all tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import make_certificate, require_program


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
