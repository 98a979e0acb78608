"""
The endpoint string ``connlimit:``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import RecordingFactory
from support.sockets import connected, patiently, until
from support.tls import talk_tls
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.threads import deferToThread

from connlimit import Limiter, LimitingEndpoint
from connlimit._listening import proxy_header
from connlimit.interfaces import IConnection
from connlimit.observers import LimiterObserver


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """
    The descriptions of inner endpoints that were asked for; none is made.
    """
    asked: list[str] = []

    def record(reactor: object, description: str) -> str:
        asked.append(description)
        return description

    monkeypatch.setattr(proxy_header, "serverFromString", record)
    return asked


def parse(description: str) -> LimitingEndpoint:
    return serverFromString(reactor, description)


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("connlimit:tcp:8080:max_connections=100", "tcp:8080"),
        ("connlimit:tcp:8080:interface=127.0.0.1:max_connections=100", "tcp:8080:interface=127.0.0.1"),
        ("connlimit:max_connections=100:tcp:port=80", "tcp:port=80"),
        (r"connlimit:tcp6:0:interface=\:\:1:max_per_peer=5", r"tcp6:0:interface=\:\:1"),
        ("connlimit:unix:/run/x.sock:mode=660:max_connections=5", "unix:/run/x.sock:mode=660"),
        (r"connlimit:ssl:443:privateKey=C\:/key.pem:max_rate=3", r"ssl:443:privateKey=C\:/key.pem"),
        (r"connlimit:unix:/odd\=name\\:max_connections=5", r"unix:/odd\=name\\"),
        ("connlimit:tls:/certificates:8443:max_connections=5", "tls:/certificates:8443"),
        ("connlimit:haproxy:tcp:8080:max_connections=5", "haproxy:tcp:8080"),
        ("connlimit:systemd:domain=INET:name=web:max_connections=5", "systemd:domain=INET:name=web"),
        ("connlimit:tcp:8080:max_connections=none", "tcp:8080"),
    ],
)
def test_settings_are_taken_out_and_the_rest_is_the_inner_endpoints(
    inner: list[str], description: str, expected: str
) -> None:
    endpoint = parse(description).endpoint
    assert getattr(endpoint, "endpoint", endpoint) == expected
    assert inner == [expected]


def test_every_setting_reaches_the_limiter(inner: list[str]) -> None:
    limiter = parse("connlimit:tcp:0:max_connections=3:max_waiting=none:wait_timeout=1.5:limiter=all").limiter
    settings = limiter.settings
    assert (settings.max_connections, settings.max_waiting) == (3, None)
    assert (settings.wait_timeout, settings.name) == (1.5, "all")


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("connlimit:tcp:0:max_connections=many", ["max_connections must be a whole number", "'many'"]),
        ("connlimit:tcp:0:max_waiting=-1", ["max_waiting", "'-1'"]),
        ("connlimit:tcp:0:wait_timeout=0", ["wait_timeout", "'0'"]),
        ("connlimit:tcp:0:max_conections=5", ["it takes no max_conections; did you mean max_connections?"]),
        ("connlimit:tcp:0:max-rate=5", ["it takes no max-rate; did you mean max_rate?"]),
        ("connlimit:tcp:0:max_rate=1:nonsense=5", ["it takes no nonsense", "connlimit itself takes max_con"]),
        ("connlimit:tcp:max_rate=1", ["'tcp' is not an endpoint (its port is missing)"]),
        ("connlimit:tpc:80:max_rate=1", ["'tpc:80' is not an endpoint (there is not an endpoint 'tpc')"]),
        ("connlimit:tcp:http:max_rate=1", ["'tcp:http' is not an endpoint ('http' is not a number)"]),
        ("connlimit:max_rate=1", ["'' is not an endpoint"]),
        ("connlimit:tcp:70000:max_rate=1", ["a port must be from 0 to 65535, not 70000"]),
        ("connlimit:tcp:-1:max_rate=1:place=socket", ["a port must be from 0 to 65535, not -1"]),
        ("connlimit:haproxy:tcp:70000:max_rate=1", ["a port must be from 0 to 65535, not 70000"]),
        (
            "connlimit:tcp:0:interface=nonsense:max_rate=1",
            ["the interface must be an address of this machine"],
        ),
        ("connlimit:tcp:0:backlog=-1:max_rate=1", ["the backlog must be 0 or more", "-1"]),
        ("connlimit:unix::max_rate=1", ["the path is missing"]),
        (
            "connlimit:tcp:0",
            ["nothing would be limited: give max_connections, max_per_peer, max_rate or shared"],
        ),
        ("connlimit:tcp:0:limiter=a", ["nothing would be limited", "max_connections=none"]),
        ("connlimit:tcp:0:max_connections=1:max_burst=3", ["max_burst needs max_rate"]),
        (
            "connlimit:tcp:0:max_per_peer=0",
            ["max_per_peer must be a whole number, 1 or more, or none", "'0'"],
        ),
        (
            "connlimit:tcp:0:notice=5:max_rate=1",
            ["notice must be a time above 0 and what is said then", "'5'"],
        ),
        ("connlimit:tcp:0:shared=x:max_connections=1", ["shared must name a Redis", "'x'"]),
        ("connlimit:tcp:0:place=here", ["place must be protocol or socket", "'here'"]),
        ("connlimit:tcp:0:when_full=stop", ["when_full must be refuse or stop-accepting", "'stop'"]),
        ("connlimit:tcp:0:max_rate=1:limiter=", ["name must be a text", "''"]),
    ],
)
def test_a_wrong_string_is_a_value_error_of_one_sentence(description: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        parse(description)
    for word in words:
        assert word in str(caught.value)


def test_strings_that_name_the_same_limiter_share_it(inner: list[str]) -> None:
    first = parse("connlimit:tcp:1:max_connections=7:limiter=shared")
    second = parse("connlimit:tcp:2:limiter=shared")
    third = parse("connlimit:tcp:3:max_connections=7:limiter=shared")
    other = parse("connlimit:tcp:4:max_connections=7")
    assert first.limiter is second.limiter is third.limiter
    assert other.limiter is not first.limiter
    with pytest.raises(ValueError, match=r"max_connections of limiter shared is 7 already.*not '8'"):
        parse("connlimit:tcp:5:max_connections=8:limiter=shared")
    with pytest.raises(ValueError, match=r"wait_timeout of limiter shared is none already.*not '8s'"):
        parse("connlimit:tcp:5:wait_timeout=8s:limiter=shared")


def test_a_name_is_free_again_when_its_endpoints_are_gone(inner: list[str]) -> None:
    first = parse("connlimit:tcp:1:max_connections=1:limiter=passing")
    assert first.limiter.max_connections == 1
    del first
    gc.collect()
    assert parse("connlimit:tcp:1:max_connections=2:limiter=passing").limiter.max_connections == 2


@pytest.mark.parametrize("place", ["protocol", "socket"])
@pytest.mark.parametrize("kind", ["ssl", "tls"])
@ensureDeferred
async def test_it_limits_inside_tls_or_next_to_the_socket(kind: str, place: str, certificate: Path) -> None:
    pytest.importorskip("OpenSSL")
    inner = {
        "ssl": f"ssl:0:privateKey={certificate}:interface=127.0.0.1",
        "tls": f"tls:{certificate.parent / 'sites'}:0:interface=127.0.0.1",
    }
    sites = certificate.parent / "sites"
    sites.mkdir(exist_ok=True)
    (sites / "localhost.pem").write_text(certificate.read_text())
    try:
        serverFromString(reactor, inner[kind])
    except ValueError:
        pytest.skip(f"this Twisted has no endpoint {kind}:")
    endpoint = serverFromString(reactor, f"connlimit:{inner[kind]}:max_connections=1:place={place}")
    seen = Places()
    endpoint.limiter.add_observer(seen)
    port = await endpoint.listen(RecordingFactory())
    number = port.getHost().port
    talks = [deferToThread(talk_tls, number, certificate, b"secret") for _ in range(5)]
    for talk in talks:
        assert await patiently(talk) == b"secret"
    await until(lambda: endpoint.limiter.snapshot().finished == 5)
    assert seen.inside_tls == [place == "protocol"] * 5
    await patiently(port.stopListening())


class Places(LimiterObserver):
    """
    Whether each connection was inside TLS.
    """

    def __init__(self) -> None:
        self.inside_tls: list[bool] = []

    def finished(self, limiter: Limiter, connection: IConnection) -> None:
        self.inside_tls.append(ISSLTransport.providedBy(connection.transport))


@pytest.mark.parametrize(
    "description",
    [
        "connlimit:tcp:0:interface=127.0.0.1:max_connections=1",
        "connlimit:unix:{folder}/socket:max_connections=1",
        "haproxy:connlimit:tcp:0:interface=127.0.0.1:max_connections=1",
        "connlimit:haproxy:tcp:0:interface=127.0.0.1:max_connections=1",
        "connlimit:haproxy:tcp:0:interface=127.0.0.1:max_connections=1:place=socket",
        "connlimit:unix:{folder}/socket:max_connections=1:place=socket",
    ],
)
@ensureDeferred
async def test_it_limits_whatever_the_inner_endpoint_is(description: str, tmp_path: Path) -> None:
    server = RecordingFactory()
    port = await serverFromString(reactor, description.format(folder=tmp_path)).listen(server)
    host = port.getHost()
    where = f"tcp:127.0.0.1:{host.port}" if hasattr(host, "port") else f"unix:{host.name.decode()}"
    header = b"PROXY TCP4 192.0.2.1 127.0.0.1 5 6\r\n" if "haproxy" in description else b""
    first = await connected(where)
    first.transport.write(header)
    await until(lambda: server.live)
    second = await connected(where)
    second.transport.write(header + b"hello")
    first.transport.write(b"first")
    await first.receives(b"first")
    assert (len(server.live), second.received) == (1, b"")
    await first.close()
    await second.receives(b"hello")
    if header:
        assert server.live[0].transport.getPeer().host == "192.0.2.1"
    await second.close()
    await until(lambda: not server.live)
    await patiently(port.stopListening())
