"""
What the README shows is what there is.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

from support.patience import PATIENCE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text()


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"<([\w./]+)>`_", README)
    assert "docs/examples/limited_echo.py" in links
    assert "docs/examples/limited.tac" in links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_two_commands_do_everything() -> None:
    commands = [line.strip() for line in README.splitlines() if line.strip().startswith("$ ")]
    assert len(commands) == 2
    assert commands[0].endswith("twistd -n connlimit")
    assert commands[1].endswith("pytest -n 2")


def test_the_example_in_code_runs() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "docs/examples/limited_echo.py"), "tcp:0:interface=127.0.0.1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        while "starting on" not in line:
            assert line
            line = process.stdout.readline()
        address = ("127.0.0.1", int(line.split()[-1]))
        connections = [socket.create_connection(address, PATIENCE) for _ in range(3)]
        for connection in connections:
            connection.sendall(b"hello")
        assert [connection.recv(10) for connection in connections[:2]] == [b"hello", b"hello"]
        connections[0].close()
        assert connections[2].recv(10) == b"hello"
        for connection in connections[1:]:
            connection.close()
    finally:
        process.terminate()
        rest = process.communicate(timeout=PATIENCE)[0]
    assert not re.search("Traceback|Unhandled", rest), rest
