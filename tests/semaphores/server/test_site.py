"""
The Throttle protocol over HTTP, beside the original server, and with its own client.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from support.clients import free_port
from support.patience import PATIENCE
from support.semaphores import Server, in_thread, original, ours, wait_until_pending


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ours(tmp_path_factory.mktemp("semaphores")) as running_server:
        yield running_server


Step = tuple[str, str, object]

ACQUIRE = "?expires_in=300000ms"

# Each step of a conversation: the method, the path, the body. {0} is the first peer's number, and so on.
CONVERSATIONS: dict[str, list[Step]] = {
    "what there is without a peer": [
        ("GET", "/", None),
        ("GET", "/health", None),
        ("GET", "/remainder?semaphore=A", None),
        ("GET", "/remainder?semaphore=%2F%26", None),
        ("GET", "/remainder?semaphore=Z", None),
        ("GET", "/metrics", None),
    ],
    "unknown peers": [
        ("PUT", "/peers/5", {"expires_in": "1s"}),
        ("DELETE", "/peers/5", None),
        ("PUT", "/peers/5/A", 1),
        ("PUT", f"/peers/5/A{ACQUIRE}", 1),
        ("PUT", "/peers/5/A?", 0),
        ("PUT", f"/peers/5/A{ACQUIRE}", 0),
        ("PUT", "/peers/5/A", 6),
        ("PUT", "/peers/5/Z", 1),
        ("DELETE", "/peers/5/A", None),
        ("DELETE", "/peers/5/Z", None),
        ("GET", "/peers/5/is_acquired", None),
    ],
    "acquire and release": [
        ("POST", "/new_peer", {"expires_in": "300000ms"}),
        ("GET", "/peers/{0}/is_acquired", None),
        ("PUT", f"/peers/{{0}}/A{ACQUIRE}&block_for=10ms", 3),
        ("GET", "/peers/{0}/is_acquired", None),
        ("GET", "/remainder?semaphore=A", None),
        ("PUT", f"/peers/{{0}}/A{ACQUIRE}", 3),
        ("PUT", "/peers/{0}/A", 2),
        ("PUT", "/peers/{0}/A", 4),
        ("PUT", "/peers/{0}", {"expires_in": "5min"}),
        ("DELETE", "/peers/{0}/B", None),
        ("DELETE", "/peers/{0}/A", None),
        ("DELETE", "/peers/{0}/A", None),
        ("GET", "/remainder?semaphore=A", None),
        ("DELETE", "/peers/{0}", None),
        ("DELETE", "/peers/{0}", None),
    ],
    "counts": [
        ("POST", "/new_peer", {"expires_in": "1h30m"}),
        ("PUT", "/peers/{0}/A", 0),
        ("PUT", "/peers/{0}/A", -1),
        ("PUT", "/peers/{0}/A", 6),
        ("PUT", "/peers/{0}/none", 1),
        ("PUT", "/peers/{0}/none", 0),
        ("PUT", "/peers/{0}/Z", 0),
        ("PUT", "/peers/{0}/A", 5),
    ],
    "the line": [
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("PUT", "/peers/{0}/A", 3),
        ("PUT", "/peers/{1}/A", 3),
        ("PUT", "/peers/{2}/A", 1),
        ("PUT", "/peers/{3}/A", 2),
        ("GET", "/metrics", None),
        ("GET", "/peers/{1}/is_acquired", None),
        ("PUT", "/peers/{1}/A", 3),
        ("PUT", "/peers/{1}/A", 2),
        ("PUT", "/peers/{1}/A", 4),
        ("DELETE", "/peers/{1}/A", None),
        ("GET", "/peers/{1}/is_acquired", None),
        ("GET", "/peers/{2}/is_acquired", None),
        ("GET", "/peers/{3}/is_acquired", None),
        ("DELETE", "/peers/{0}", None),
        ("GET", "/peers/{3}/is_acquired", None),
        ("GET", "/remainder?semaphore=A", None),
        ("PUT", "/peers/{1}/A", 3),
        ("DELETE", "/peers/{1}", None),
        ("GET", "/metrics", None),
    ],
    "levels": [
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("PUT", "/peers/{0}/B", 1),
        ("PUT", "/peers/{0}/C", 1),
        ("PUT", "/peers/{0}/B", 2),
        ("PUT", "/peers/{0}/A", 5),
        ("PUT", "/peers/{0}/%2F%26", 1),
        ("PUT", "/peers/{1}/C", 1),
        ("PUT", "/peers/{1}/A", 1),
        ("PUT", "/peers/{1}/B", 1),
        ("PUT", "/peers/{1}/%2F%26", 1),
        ("PUT", "/peers/{1}/C", 1),
        ("PUT", "/peers/{1}/A", 1),
        ("GET", "/peers/{1}/is_acquired", None),
        ("DELETE", "/peers/{0}", None),
        ("PUT", "/peers/{1}/B", 2),
        ("DELETE", "/peers/{1}", None),
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("PUT", "/peers/{2}/B", 1),
        ("PUT", "/peers/{2}/A", 1),
        ("PUT", "/peers/{2}/B", 2),
    ],
    "restore": [
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 7, "acquired": {"A": 3, "C": 1}}),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 7, "acquired": {"A": 3, "C": 1}}),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 7, "acquired": {"A": 3}}),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 8, "acquired": {"A": 3, "C": 1}}),
        ("GET", "/remainder?semaphore=A", None),
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("PUT", "/peers/{0}/A", 1),
        ("DELETE", "/peers/7/A", None),
        ("GET", "/peers/{0}/is_acquired", None),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 9, "acquired": {"Z": 1}}),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 9, "acquired": {"A": 0}}),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 9, "acquired": {}}),
        ("POST", "/restore", {"expires_in": "5min", "peer_id": 18446744073709551615, "acquired": {}}),
        ("GET", "/peers/18446744073709551615/is_acquired", None),
    ],
    "names that no semaphore has": [
        ("POST", "/new_peer", {"expires_in": "5min"}),
        ("GET", "/remainder?semaphore", None),
        ("GET", "/remainder?semaphore=", None),
        ("GET", "/remainder?semaphore=%FF", None),
        ("GET", "/remainder?semaphore=A%FF", None),
        ("GET", "/remainder?semaphore=A;", None),
        ("GET", "/remainder?semaphore=A;x=1", None),
        ("PUT", "/peers/{0}/%FF", 1),
        ("PUT", "/peers/{0}/%FF", 0),
        ("PUT", "/peers/5/%C3", 1),
        ("DELETE", "/peers/{0}/%FF", None),
        ("PUT", "/peers/{0}/%zz", 1),
    ],
    "durations": [
        ("POST", "/new_peer", {"expires_in": text})
        for text in ("2h 37min", "1h30m", "1 s", " 1s ", "5m", "1d", "1week", "1M", "1y", "1ms", "1us", "1ns")
    ],
}


def talk(server: Server, steps: list[Step]) -> list[tuple[int, str]]:
    """
    What a server answers, with the numbers of new peers replaced.
    """
    peers: list[str] = []
    answers = []
    for method, path, body in steps:
        status, text = server.ask(method, path.format(*peers), body)
        if path == "/new_peer" and status == 200:
            assert 0 <= int(text) < 2**64
            peers.append(text)
        for index, peer in enumerate(peers):
            text = re.sub(rf"\b{peer}\b", f"peer {index}", text)
        # A counter that later versions of the original have no more.
        text = re.sub(r".*throttle_num_404.*\n", "", text)
        answers.append((status, text))
    return answers


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_request_is_answered_as_by_the_original_server(name: str, tmp_path: Path) -> None:
    steps = CONVERSATIONS[name]
    with original(tmp_path) as theirs, ours(tmp_path) as own:
        expected, found = talk(theirs, steps), talk(own, steps)
    assert list(zip(steps, found, strict=True)) == list(zip(steps, expected, strict=True))


def test_releasing_a_lock_that_is_not_held_touches_no_other(tmp_path: Path) -> None:
    with original(tmp_path) as theirs, ours(tmp_path) as own:
        for server, is_acquired in ((theirs, "true"), (own, "false")):
            holder, waiter = server.new_peer(), server.new_peer()
            server.acquire(holder, "A", 5)
            assert server.acquire(waiter, "A") == 202
            server.release(waiter, "B")
            # The original says that nothing is pending any more: it has cancelled the lock on A.
            assert server.ask("GET", f"/peers/{waiter}/is_acquired") == (200, is_acquired)


class TestWaiting:
    def test_a_request_waits_for_its_lock_and_is_answered_when_it_is_granted(self, server: Server) -> None:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        waiting = in_thread(lambda: (server.acquire(waiter, "C", 1, "block_for=30s"), time.monotonic()))
        wait_until_pending(server, waiter)
        server.release(holder, "C")
        released = time.monotonic()
        status, at = waiting()
        assert status == 200
        assert at - released < 1
        server.ask("DELETE", f"/peers/{waiter}")

    def test_it_is_answered_when_it_has_waited_long_enough_and_keeps_its_place(self, server: Server) -> None:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        began = time.monotonic()
        assert server.acquire(waiter, "C", 1, "block_for=200ms") == 202
        assert 0.2 <= time.monotonic() - began < 2
        server.ask("DELETE", f"/peers/{holder}")
        assert server.ask("GET", f"/peers/{waiter}/is_acquired") == (200, "true")
        server.ask("DELETE", f"/peers/{waiter}")

    def test_it_is_told_at_once_when_its_peer_is_no_more(self, server: Server) -> None:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        waiting = in_thread(lambda: server.ask("PUT", f"/peers/{waiter}/C?block_for=30s", 1))
        wait_until_pending(server, waiter)
        server.ask("DELETE", f"/peers/{waiter}")
        assert waiting() == (400, "Unknown peer")
        server.ask("DELETE", f"/peers/{holder}")

    def test_a_client_that_goes_away_keeps_its_place(self, server: Server) -> None:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        with closing(socket.create_connection(("127.0.0.1", server.port))) as client:
            client.sendall(
                b"PUT /peers/%d/C?block_for=30s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1\r\n\r\n1" % waiter
            )
            wait_until_pending(server, waiter)
        server.ask("DELETE", f"/peers/{holder}")
        assert server.ask("GET", "/remainder?semaphore=C") == (200, "0")
        server.ask("DELETE", f"/peers/{waiter}")

    def test_the_next_in_line_gets_the_lock_of_a_peer_that_expires(self, server: Server) -> None:
        holder, waiter = server.new_peer("300ms"), server.new_peer()
        server.acquire(holder, "C")
        began = time.monotonic()
        assert server.acquire(waiter, "C", 1, "block_for=30s") == 200
        assert time.monotonic() - began < 5
        assert server.ask("GET", f"/peers/{holder}/is_acquired") == (400, "Unknown peer")
        server.ask("DELETE", f"/peers/{waiter}")

    def test_a_peer_that_expires_at_once_holds_nothing_at_the_next_request(self, server: Server) -> None:
        holder = server.new_peer()
        server.acquire(holder, "C", 1)
        assert server.ask("PUT", f"/peers/{holder}", {"expires_in": "0s"}) == (200, "Ok")
        assert server.ask("GET", "/remainder?semaphore=C") == (200, "1")


def test_peers_are_listed_with_what_they_hold_and_want(tmp_path: Path) -> None:
    with ours(tmp_path) as server:
        assert server.ask("GET", "/peers/") == (200, "[]")
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "/&", 2)
        server.acquire(waiter, "/&", 1)
        status, text = server.ask("GET", "/peers/")
        facts = {each["id"]: each for each in json.loads(text)}
        assert facts[holder]["acquired"]["/&"]["count"] == 2
        assert facts[holder]["acquired"]["/&"]["for"] < PATIENCE
        assert facts[holder]["pending"] is None
        assert facts[waiter]["pending"]["semaphore"] == "/&"
        assert 200 < facts[waiter]["expires_in"] <= 300


NAMES = ["/&", "is_acquired", "a b", "%2F", "ü€😀", '"\\', "..", "?x=1#y", "\t"]


def test_a_semaphore_can_have_any_name(tmp_path: Path) -> None:
    text = "[semaphores]\n" + "\n".join(f"{json.dumps(name, ensure_ascii=False)} = 1" for name in NAMES)
    with ours(tmp_path, text=text) as server:
        for name in NAMES:
            peer = server.new_peer()
            assert server.acquire(peer, name) == 200
            assert server.ask("GET", f"/remainder?semaphore={quote(name, safe='')}") == (200, "0")
            server.release(peer, name)
        metrics = server.ask("GET", "/metrics")[1]
        assert r'throttle_max{semaphore="\"\\"} 1' in metrics


JSON = {"Content-Type": "application/json"}

# Requests that are none of the protocol's: the method, the path, the body, the headers, the right status.
MALFORMED = [
    ("POST", "/new_peer", b'{"expires_in": "1s"}', {"Content-Type": "text/plain"}, 415),
    ("POST", "/new_peer", None, {}, 415),
    ("POST", "/new_peer", b"", JSON, 400),
    ("POST", "/new_peer", b"{", JSON, 400),
    ("POST", "/new_peer", b"\xff", JSON, 400),
    ("POST", "/new_peer", b"[" * 50_000, JSON, 400),
    ("POST", "/new_peer", b"{}", JSON, 422),
    ("POST", "/new_peer", b"[]", JSON, 422),
    ("POST", "/new_peer", b'{"expires_in": 5}', JSON, 422),
    *(
        ("POST", "/new_peer", json.dumps({"expires_in": text}).encode(), JSON, 422)
        for text in ("", "5", "-1s", "1S", "1MIN", "s", "1 s x", "9999999y", "1e9s", "\u0661s", "1s" * 1000)
    ),
    ("PUT", "/peers/1/A", b'"1"', JSON, 422),
    ("PUT", "/peers/1/A", b"1.0", JSON, 422),
    ("PUT", "/peers/1/A", b"true", JSON, 422),
    ("PUT", "/peers/1/A", b"9223372036854775808", JSON, 422),
    ("PUT", "/peers/1/A", b"1" * 5000, JSON, 400),
    ("PUT", "/peers/1/A?expires_in=5", b"1", JSON, 400),
    ("PUT", "/peers/1/A?block_for=5", b"1", JSON, 400),
    ("PUT", "/peers/1/A?block_for=9999999y", b"1", JSON, 400),
    ("PUT", "/peers/1/A?block_for=%FF", b"1", JSON, 400),
    ("POST", "/new_peer", b'{"expires_in": "1s", "expires_in": "2s"}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 1, "acquired": {"A": 1, "A": 2}}', JSON, 422),
    ("PUT", "/peers/abc/A", b"1", JSON, 400),
    ("PUT", "/peers/-1/A", b"1", JSON, 400),
    ("PUT", "/peers/18446744073709551616/A", b"1", JSON, 400),
    ("PUT", "/peers/1/%FF", b"1", JSON, 400),
    ("PUT", "/peers/1/", b"1", JSON, 404),
    ("PUT", "/peers/1/A/B", b"1", JSON, 404),
    ("GET", "/remainder", None, {}, 400),
    ("GET", "/remainder?semaphore=A&semaphore=B", None, {}, 400),
    ("GET", "/remainder?semaphore=%FF", None, {}, 400),
    ("GET", "/peers", None, {}, 404),
    ("GET", "//new_peer", None, {}, 404),
    ("GET", "/new_peer", None, {}, 405),
    ("OPTIONS", "/peers/1/A", None, {}, 405),
    ("DELETE", "/metrics", None, {}, 405),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 1}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": -1, "acquired": {}}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 18446744073709551616, "acquired": {}}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 1.5, "acquired": {}}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 1, "acquired": {"A": 1.5}}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 1, "acquired": ["A"]}', JSON, 422),
    ("POST", "/restore", b'{"expires_in": "1s", "peer_id": 1, "acquired": {"\\ud800": 1}}', JSON, 400),
]


@pytest.mark.parametrize(
    "request_", MALFORMED, ids=lambda each: f"{each[0]} {each[1][:40]} {str(each[2])[:40]}"
)
def test_a_malformed_request_is_told_what_is_wrong(
    server: Server, request_: tuple[str, str, bytes | None, dict[str, str], int]
) -> None:
    method, path, body, headers, right = request_
    status, text = server.ask(method, path, body, {"Content-Type": "", **headers})
    assert status == right, text
    assert text
    assert len(text) < 500
    assert server.ask("GET", "/health") == (200, "Ok")


@pytest.mark.parametrize(
    ("query", "right"),
    [
        ("expires_in", "expires_in must be a duration such as 300ms, 5min or 2h 30min, not ''\n"),
        ("expires_in=%FF", "expires_in must be a duration such as 300ms, 5min or 2h 30min, not '\ufffd'\n"),
        ("expires_in=1s&expires_in=2s", "the query must say expires_in once\n"),
        ("block_for=1s&block_for=1s", "the query must say block_for once\n"),
        (
            "expires_in=1s;block_for=1s",
            "expires_in must be a duration such as 300ms, 5min or 2h 30min, not '1s;block_for=1s'\n",
        ),
    ],
)
def test_a_query_that_can_be_read_in_two_ways_acquires_nothing(
    server: Server, query: str, right: str
) -> None:
    peer = server.new_peer()
    assert server.ask("PUT", f"/peers/{peer}/A?{query}", 1) == (400, right)
    assert server.ask("GET", "/remainder?semaphore=A") == (200, "5")
    server.ask("DELETE", f"/peers/{peer}")


def test_a_target_is_answered_again_as_it_was_at_first(server: Server) -> None:
    peer, other = server.new_peer(), server.new_peer()
    for _ in range(3):
        assert server.acquire(peer, "A") == 200
        assert server.ask("GET", f"/peers/{peer}/A")[0] == 405
        assert server.ask("DELETE", f"/peers/{peer}/A") == (200, "Ok")
        assert server.ask("GET", f"/peers/{other}/is_acquired") == (200, "true")
        assert server.ask("GET", "/peers/x/is_acquired")[0] == 400
        assert server.ask("GET", "/peers/1/%FF")[0] == 405
        assert server.ask("GET", "/nowhere")[0] == 404
        assert server.ask("GET", f"/nowhere?{'x' * 500}")[0] == 404
    server.ask("DELETE", f"/peers/{peer}")
    assert server.ask("GET", f"/peers/{peer}/is_acquired") == (400, "Unknown peer")


def test_a_body_of_a_gigabyte_is_refused_and_not_kept(tmp_path: Path) -> None:
    with ours(tmp_path) as server:
        before = server.program.resident_memory()
        with closing(socket.create_connection(("127.0.0.1", server.port), PATIENCE)) as client:
            size = 2**30
            client.sendall(
                b"POST /new_peer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % size
            )
            piece = bytes(2**20)
            for _ in range(size // len(piece)):
                client.sendall(piece)
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
        assert server.program.resident_memory() < before + 20 * 2**20
        assert server.ask("GET", "/health") == (200, "Ok")


def test_there_are_no_more_peers_than_there_may_be(tmp_path: Path) -> None:
    with ours(tmp_path, "--max-peers", "3") as server:
        peers = [server.new_peer() for _ in range(3)]
        status, text = server.ask("POST", "/new_peer", {"expires_in": "1s"})
        assert (status, text) == (429, "There are 3 peers already, and there can be no more.")
        restored = {"expires_in": "1s", "peer_id": 1, "acquired": {}}
        assert server.ask("POST", "/restore", restored)[0] == 429
        server.ask("DELETE", f"/peers/{peers[0]}")
        server.new_peer()


def test_a_browser_is_shown_the_semaphores(tmp_path: Path) -> None:
    with ours(tmp_path, text='[semaphores]\n"<b>" = 3\n') as server:
        status, page = server.ask("GET", "/", headers={"Accept": "text/html,*/*"})
        assert status == 200
        assert "&lt;b&gt;" in page
        assert "<b>" not in page
        assert server.ask("HEAD", "/") == (200, "")
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as connection:
            connection.request("GET", "/favicon.ico")
            answer = connection.getresponse()
            assert answer.getheader("content-type") == "image/x-icon"
            assert len(answer.read()) == 1150


throttle_client = pytest.importorskip("throttle_client", reason="throttle-client is not installed")


class TestThrottleClient:
    """
    Throttle's own client for Python, as it is.
    """

    @pytest.fixture(autouse=True)
    def _peers_of_this_test(self) -> Iterator[None]:
        throttle_client.clear_peers()
        yield
        throttle_client.clear_peers()

    def test_a_lock_is_held_within_its_context(self, server: Server) -> None:
        url = f"http://127.0.0.1:{server.port}"
        client = throttle_client.Client(url)
        with throttle_client.lock(url, "/&", count=2) as peer:
            assert client.remainder("/&") == 0
            assert client.is_acquired(peer.id)
        assert client.remainder("/&") == 2

    def test_locks_can_be_nested_down_the_levels_only(self, server: Server) -> None:
        url = f"http://127.0.0.1:{server.port}"
        client = throttle_client.Client(url)
        with (
            throttle_client.lock(url, "C"),
            throttle_client.lock(url, "B", 2),
            throttle_client.lock(url, "A"),
        ):
            assert [client.remainder(name) for name in "ABC"] == [4, 3, 0]
            with pytest.raises(ValueError, match="Lock hierachy violation"):
                throttle_client.lock(url, "/&").__enter__()
        assert [client.remainder(name) for name in "ABC"] == [5, 5, 1]

    def test_what_can_never_be_is_an_error_and_holds_nothing(self, server: Server) -> None:
        url = f"http://127.0.0.1:{server.port}"
        client = throttle_client.Client(url)
        with pytest.raises(ValueError, match="Unknown semaphore"):
            throttle_client.lock(url, "Z").__enter__()
        with pytest.raises(ValueError, match="Lock asks for count 6 yet full count is only 5"):
            throttle_client.lock(url, "A", count=6).__enter__()
        with pytest.raises(ValueError, match="Unknown semaphore"):
            client.restore(5, {"Z": 1}, expires_in=timedelta(seconds=10))
        with pytest.raises(throttle_client.client.UnknownPeer):
            client.is_acquired(5)
        assert client.remainder("A") == 5

    def test_an_error_within_its_context_gives_the_lock_back(self, server: Server) -> None:
        url = f"http://127.0.0.1:{server.port}"
        with pytest.raises(KeyError), throttle_client.lock(url, "C"):
            assert throttle_client.Client(url).remainder("C") == 0
            raise KeyError
        assert throttle_client.Client(url).remainder("C") == 1

    def test_a_peer_that_is_forgotten_is_made_anew_with_its_locks(self, server: Server) -> None:
        url = f"http://127.0.0.1:{server.port}"
        client = throttle_client.Client(url)
        with throttle_client.lock(url, "C") as peer:
            client.release(peer.id)
            assert client.remainder("C") == 1
            with throttle_client.lock(url, "B", 2):
                assert [client.remainder(name) for name in "BC"] == [3, 0]
        assert [client.remainder(name) for name in "BC"] == [5, 1]

    def test_a_lock_that_waits_is_granted_though_the_server_has_lost_its_memory(self, tmp_path: Path) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"

        def wait() -> bool:
            with throttle_client.lock(url, "C", timeout=timedelta(seconds=60)) as peer:
                return bool(throttle_client.Client(url).is_acquired(peer.id))

        with ours(tmp_path, port=port) as server:
            holder = server.new_peer()
            server.acquire(holder, "C")
            waiting = in_thread(wait)
            began = time.monotonic()
            while 'throttle_pending{semaphore="C"} 1' not in server.ask("GET", "/metrics")[1]:
                assert time.monotonic() - began < PATIENCE
                time.sleep(0.02)
            server.program.process.kill()
            server.program.process.wait()
        with ours(tmp_path, port=port) as server:
            assert waiting()
            assert server.ask("GET", "/remainder?semaphore=C") == (200, "1")

    def test_a_large_lock_is_not_overtaken_by_small_ones(self, server: Server) -> None:
        client = throttle_client.Client(f"http://127.0.0.1:{server.port}")
        in_a_while = timedelta(seconds=60)
        first, large, small = (client.new_peer(expires_in=in_a_while) for _ in range(3))
        assert client.acquire(first, "A", count=3)
        assert not client.acquire(large, "A", count=5)
        assert not client.acquire(small, "A", count=1)
        waiting = in_thread(lambda: client.acquire(large, "A", count=5, block_for=in_a_while))
        client.release(first)
        assert waiting()
        assert not client.is_acquired(small)
        client.release_lock(large, "A")
        assert client.is_acquired(small)
        for peer in (large, small):
            client.release(peer)

    def test_the_locks_of_a_peer_that_expires_go_to_who_waits(self, server: Server) -> None:
        client = throttle_client.Client(f"http://127.0.0.1:{server.port}")
        gone = client.new_peer(expires_in=timedelta(seconds=0.5))
        patient = client.new_peer(expires_in=timedelta(seconds=0.5))
        assert client.acquire(gone, "C")
        in_a_while = timedelta(seconds=30)
        began = time.monotonic()
        # Waiting prolongs its life, without which it would be gone as well.
        assert client.acquire(patient, "C", block_for=in_a_while, expires_in=in_a_while)
        assert 0.3 < time.monotonic() - began < 10
        client.release(patient)

    def test_it_gives_up_in_time(self, server: Server) -> None:

        url = f"http://127.0.0.1:{server.port}"
        holder = server.new_peer()
        server.acquire(holder, "C")
        began = time.monotonic()
        with pytest.raises(throttle_client.Timeout):
            throttle_client.lock(url, "C", timeout=timedelta(seconds=0.3)).__enter__()
        assert time.monotonic() - began < 5
        throttle_client.get_local_peer(url).remove_from_server()
        server.ask("DELETE", f"/peers/{holder}")

    def test_a_heartbeat_keeps_the_lock_and_restores_it_after_a_restart(self, tmp_path: Path) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with ours(tmp_path, port=port) as server:
            peer = throttle_client.PeerWithHeartbeat(
                throttle_client.Client(url),
                expiration_time=timedelta(seconds=2),
                heartbeat_interval=timedelta(seconds=0.2),
            )
            throttle_client.set_local_peer(url, peer)
            lock = throttle_client.lock(url, "C")
            lock.__enter__()
            began = time.monotonic()
            while time.monotonic() - began < 3:
                assert server.ask("GET", "/remainder?semaphore=C") == (200, "0")
                time.sleep(0.2)
            server.program.process.kill()
            server.program.process.wait()
        with ours(tmp_path, "--grace", "30s", port=port) as server:
            newcomer = server.new_peer()
            assert server.acquire(newcomer, "C") == 202
            began = time.monotonic()
            while server.ask("GET", f"/peers/{peer.id}/is_acquired") != (200, "true"):
                assert time.monotonic() - began < PATIENCE
                time.sleep(0.05)
            assert server.ask("GET", "/remainder?semaphore=C") == (200, "0")
            lock.__exit__(None, None, None)
            assert server.ask("GET", "/remainder?semaphore=C") == (200, "1")
