"""
Fixtures for all tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import make_certificate


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """
    A file with a private key and its certificate for localhost.
    """
    return make_certificate(tmp_path)
