"""
Clients that mean no good to the server of semaphores, over real sockets.
"""

from __future__ import annotations

import re
import selectors
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from support.clients import read_all
from support.patience import PATIENCE
from support.programs import running
from support.semaphores import Server, ours

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ours(tmp_path_factory.mktemp("semaphores")) as running_server:
        yield running_server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE)


def talk(server: Server, *pieces: bytes) -> bytes:
    """
    All that is answered to some pieces, until the server closes the connection or says nothing for a while.
    """
    with closing(connect(server)) as client:
        with suppress(ConnectionError):  # the server closed it after an answer
            for piece in pieces:
                client.sendall(piece)
        client.settimeout(0.5)
        received = b""
        with suppress(TimeoutError, ConnectionResetError):
            while chunk := client.recv(65536):
                received += chunk
        return received


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d+) ", answers)]


def push(client: socket.socket, data: bytes, seconds: float) -> int:
    """
    Send the data again and again, and read nothing, until nothing more was taken for a while.

    :return: how many bytes were taken.
    """
    client.setblocking(False)
    sent = 0
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_WRITE)
        until = time.monotonic() + seconds
        while time.monotonic() < until and selector.select(1.0):
            sent += client.send(data)
    return sent


@pytest.mark.parametrize("path", ["/health", "/peers/", "/metrics", "/nowhere"])
def test_who_sends_requests_and_reads_no_answers_is_read_no_further(server: Server, path: str) -> None:
    before = server.program.resident_memory()
    with closing(connect(server)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = push(client, HEALTH.replace(b"/health", path.encode()) * 1000, 5)
        # No more than fits into the buffers of the kernel.
        assert sent < 16 * 2**20
        assert server.program.resident_memory() < before + 5 * 2**20
        assert server.ask("GET", "/health") == (200, "Ok")


def test_who_sends_requests_while_one_waits_is_read_no_further_and_answered_in_order(server: Server) -> None:
    holder, waiter = server.new_peer(), server.new_peer()
    server.acquire(holder, "C")
    before = server.program.resident_memory()
    waiting = (
        b"PUT /peers/%d/C?block_for=1s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1\r\n\r\n1" % waiter
    )
    with closing(connect(server)) as client:
        client.sendall(waiting + HEALTH)
        assert push(client, HEALTH * 1000, 0.5) < 16 * 2**20
        assert server.program.resident_memory() < before + 5 * 2**20
    assert statuses(talk(server, waiting + HEALTH, b"GET /nowhere HTTP/1.1\r\n\r\n")) == []
    with closing(connect(server)) as client:
        client.sendall(waiting + HEALTH + b"GET /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n" + HEALTH)
        assert statuses(read_all(client)) == [202, 200, 404]
    for peer in (holder, waiter):
        server.ask("DELETE", f"/peers/{peer}")


#: What is no request, or one of two meanings: what is sent, and the statuses of the answers.
WRONG = [
    (b"GET /health\r\n\r\n", [400]),
    (b"GET /health HTTP/2.0\r\n\r\n", [400]),
    (b"FOO /health HTTP/1.1\r\n\r\n", [501]),
    (b"GET /health HTTP/1.1\r\nHost x\r\n\r\n", [400]),
    (b"GET /health HTTP/1.1\r\nA: 1\r\n B: 2\r\n\r\n", [400]),
    (b"GET /health HTTP/1.1\r\nContent-Length : 1\r\n\r\n1", [400]),
    (b"GET /health HTTP/1.1\r\nA\0: 1\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: x\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: -1\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: +1\r\n\r\n1", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n1", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: 2, 3\r\n\r\n{}", [400]),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n", [400]),
    (b"POST /new_peer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}GET / HTTP/1.1\r\n\r\n", [400]),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [501]),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    (HEALTH + b"nonsense\r\n\r\n" + HEALTH, [200]),
    (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", [431]),
    (b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n", [431]),
    (b"GET / HTTP/1.1\r\n" + b"A: 1\r\n" * 4000 + b"\r\n", [431]),
    (b"A" * 70_000, [501]),
    (b"\r\n" * 20_000, [431]),
]


@pytest.mark.parametrize(("sent", "right"), WRONG, ids=lambda each: repr(each[:80]))
def test_what_is_no_clear_request_is_refused_and_the_connection_closed(
    server: Server, sent: bytes, right: list[int]
) -> None:
    with closing(connect(server)) as client:
        client.settimeout(5)
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answers = read_all(client)
    assert statuses(answers) == right
    assert "Traceback" not in server.program.output
    assert server.ask("GET", "/health") == (200, "Ok")


#: What is unusual and right.
UNUSUAL = [
    (b"\r\n" + HEALTH, [200]),
    (b"GET http://x:8000/health HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    (b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + HEALTH, [200, 200]),
    (
        b"POST /new_peer HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'c;x="1"\r\n{"expires_in\r\n6\r\n":"1s"\r\n1\r\n}\r\n0\r\nTrailer: x\r\n\r\n' + HEALTH,
        [200, 200],
    ),
    (b"POST /new_peer HTTP/1.1\r\nContent-Length: 0\r\n\r\n" + HEALTH, [415, 200]),
    (b"GET /health HTTP/1.0\r\n\r\n" + HEALTH, [200]),
    (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + HEALTH, [200]),
    (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n" + HEALTH, [200]),
    (b"HEAD /nowhere HTTP/1.1\r\n\r\n" + HEALTH, [404, 200]),
    (HEALTH * 500, [200] * 500),
    (b"POST /restore HTTP/1.1\r\nContent-Length: 70000\r\n\r\n" + b" " * 70_000 + HEALTH, [413, 200]),
]


@pytest.mark.parametrize(("sent", "right"), UNUSUAL, ids=lambda each: repr(each[:80]))
@pytest.mark.parametrize("size", [7, 1_000_000])
def test_what_is_unusual_and_right_is_answered(
    server: Server, sent: bytes, right: list[int], size: int
) -> None:
    pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
    if len(pieces) > 1000:
        pieces = [sent[:100], *(sent[at : at + 50_000] for at in range(100, len(sent), 50_000))]
    assert statuses(talk(server, *pieces)) == right


def test_a_client_that_waits_for_it_is_told_to_send_the_body(server: Server) -> None:
    head = b"POST /new_peer HTTP/1.1\r\nContent-Type: application/json\r\nExpect: 100-Continue\r\n"
    with closing(connect(server)) as client:
        client.sendall(head + b"Content-Length: 20\r\n\r\n")
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b'{"expires_in": "1s"}')
        assert statuses(client.recv(4096)) == [200]
        # Also one that waits with it behind a request that takes its time.
        client.sendall(HEALTH + head + b"Content-Length: 20\r\n\r\n")
        received = b""
        while statuses(received) != [200, 100]:
            received += client.recv(4096)
    # And not to send one that is too long.
    assert statuses(talk(server, head + b"Content-Length: 9999999\r\n\r\n")) == [413]


def test_one_address_has_its_share_of_the_connections_and_no_more(tmp_path: Path) -> None:
    with ours(tmp_path, "--max-per-peer", "20") as server, ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(server))) for _ in range(20)]
        for client in clients:
            client.sendall(HEALTH)
            assert statuses(client.recv(4096)) == [200]
        assert server.ask("GET", "/health")[0] == 503
        with closing(socket.socket()) as other:
            other.bind(("127.0.0.2", 0))
            other.settimeout(PATIENCE)
            other.connect(("127.0.0.1", server.port))
            other.sendall(HEALTH)
            assert statuses(other.recv(4096)) == [200]


def test_thousands_that_stay_half_way_cost_little_and_stop_nobody(tmp_path: Path) -> None:
    with ours(tmp_path) as server, ExitStack() as stack:
        before = server.program.resident_memory()
        for number in range(2000):
            client = stack.enter_context(closing(connect(server)))
            client.sendall(b"PUT /peers/1/A HTTP/1.1\r\nContent-Length: 60000\r\n\r\n"[: number % 60])
        assert server.ask("GET", "/health") == (200, "Ok")
        assert server.program.resident_memory() < before + 2000 * 20_000
        assert "Traceback" not in server.program.output


def test_within_tls_all_is_as_without(tmp_path: Path, certificate: Path) -> None:
    (tmp_path / "throttle.toml").write_text("[semaphores]\n" + "".join(f"s{n} = 1\n" for n in range(3000)))
    listen = f"ssl:0:privateKey={certificate}:interface=127.0.0.1"
    with running("connlimit-semaphores", "--listen", listen, cwd=tmp_path) as program:
        asked = b"GET /metrics HTTP/1.1\r\n\r\n" * 3 + b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
        context = ssl.create_default_context(cafile=str(certificate))
        with (
            socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as client,
        ):
            client.sendall(asked)
            answers = read_all(client)
    assert statuses(answers) == [200] * 4
    assert answers.count(b'throttle_pending{semaphore="s2999"} 0') == 3
    assert answers.endswith(b"Ok")
