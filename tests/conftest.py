"""
Fixtures for all tests.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import require_program


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """
    A file with a private key and its certificate for localhost.
    """
    file = tmp_path / "server.pem"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run([require_program("openssl"), *command.split()], check=True, capture_output=True)
    file.write_text(key.read_text() + certificate.read_text())
    return file
