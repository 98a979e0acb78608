"""
Requests limited, in every way in: real processes and real clients.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.applications import ECHO
from support.patience import PATIENCE
from support.programs import failing, running
from twisted.internet.endpoints import serverFromString
from twisted.internet.task import Clock

from connlimit._listening.endpoint import LimitingEndpoint

LOCAL = "tcp:0:interface=127.0.0.1"

SITE = """
from twisted.web.server import Site
from twisted.web.static import Data

factory = Site(Data(b"hello", "text/plain"))
"""

FILE = f"""
[limiters.web]
max_connections = 1
[services.site]
listen = "{LOCAL}"
factory = "my_site:factory"
per = "request"
"""

PLUGIN = f"""
[limiters.web]
max_connections = 1
[services.site]
plugin = ["web", "--listen={LOCAL}", "--path=."]
per = "request"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """
    A folder with a module that has a site, and with configuration files.
    """
    (tmp_path / "my_site.py").write_text(SITE)
    (tmp_path / "echo_server.py").write_text(ECHO)
    (tmp_path / "factory.toml").write_text(FILE)
    (tmp_path / "plugin.toml").write_text(PLUGIN)
    return tmp_path


LIMITED = ["connlimit", "--max-connections=1", "--max-waiting=0", "--per=request"]


@pytest.mark.parametrize(
    "arguments",
    [
        [*LIMITED, f"--listen={LOCAL}", "--factory=my_site:factory"],
        [*LIMITED, "web", f"--listen={LOCAL}", "--path=."],
        ["web", f"--listen=connlimit:{LOCAL}:max_connections=1:max_waiting=0:per=request", "--path=."],
        ["connlimit", "--config=factory.toml"],
        ["connlimit", "--config=plugin.toml"],
    ],
    ids=["factory", "plugin", "endpoint", "file", "plugin in a file"],
)
def test_clients_that_keep_their_connections_alive_are_all_answered_by_a_program(
    folder: Path, arguments: list[str]
) -> None:
    """
    There is one slot, and none of them keeps it.
    """
    with running(*arguments, cwd=folder) as program, ExitStack() as stack:
        port = program.port()
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(5)
        ]
        for client in clients * 2:
            client.sendall(b"GET /my_site.py HTTP/1.1\r\nHost: h\r\n\r\n")
            assert client.recv(9) == b"HTTP/1.1 "
            assert client.recv(3) in (b"200", b"404")
            client.recv(65536)
        program.terminate()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--factory=echo_server:factory", f"--listen={LOCAL}"],
        ["--forward=tcp:localhost:9", f"--listen={LOCAL}"],
        ["portforward", f"--port={LOCAL}", "--host=localhost"],
    ],
    ids=["factory", "relay", "plugin"],
)
def test_what_makes_no_requests_is_refused_before_it_starts(folder: Path, arguments: list[str]) -> None:
    """
    In one sentence that names the option and what would be right.
    """
    said = failing("connlimit", "--max-connections=1", "--per=request", *arguments, cwd=folder)
    assert "--per must be connection, not request: " in said
    assert "Traceback" not in said


def test_a_wrong_word_is_refused_in_every_way_in(folder: Path) -> None:
    """
    With the one that was meant.
    """
    hint = "per must be connection or request, not 'requests'; did you mean request?"
    assert hint in failing("connlimit", "--max-connections=1", "--per=requests", f"--listen={LOCAL}")
    (folder / "wrong.toml").write_text(FILE.replace('"request"', '"requests"'))
    said = failing("connlimit", "--config=wrong.toml", "--check-config", cwd=folder)
    assert hint.partition(",")[0] in said
    with pytest.raises(ValueError, match=r"per must be connection or request, not 'requests'"):
        serverFromString(Clock(), "connlimit:tcp:0:max_connections=1:per=requests")


def test_next_to_the_socket_there_are_no_requests() -> None:
    """
    So the two do not go together.
    """
    with pytest.raises(ValueError, match=r"per must be connection, not request, for place=socket"):
        serverFromString(Clock(), "connlimit:tcp:0:max_connections=1:per=request:place=socket")
    endpoint = serverFromString(Clock(), "connlimit:tcp:0:max_connections=1:per=request")
    assert isinstance(endpoint, LimitingEndpoint)
    assert endpoint.per == "request"
