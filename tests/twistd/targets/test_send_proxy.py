"""
A relay that tells its backend by a PROXY header whose connection it gets.
"""

from __future__ import annotations

import re
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from support.clients import free_port, read_all
from support.patience import PATIENCE
from support.programs import require_program, running
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.protocols.haproxy._v2parser import V2Parser

from connlimit._twistd.targets.send_proxy import proxy_header

V4, OTHER_V4 = IPv4Address("TCP", "192.0.2.1", 40000), IPv4Address("TCP", "192.0.2.2", 80)
V6, OTHER_V6 = IPv6Address("TCP", "2001:db8::1", 40000), IPv6Address("TCP", "2001:db8::2", 80)


def where(address: Any) -> tuple[object, int]:
    """
    An address, however it is written.
    """
    return ip_address(address.host), address.port


@pytest.mark.parametrize(("peer", "host"), [(V4, OTHER_V4), (V6, OTHER_V6)])
def test_both_addresses_are_in_the_header(peer: object, host: object) -> None:
    info, rest = V2Parser().feed(proxy_header(peer, host) + b"rest")
    assert (where(info.source), where(info.destination), rest) == (where(peer), where(host), b"rest")


def test_addresses_of_two_families_are_both_told_as_ipv6() -> None:
    info, _ = V2Parser().feed(proxy_header(V4, OTHER_V6))
    assert where(info.source) == (ip_address("::ffff:192.0.2.1"), 40000)
    assert where(info.destination) == where(OTHER_V6)


def test_the_zone_of_an_address_is_left_out() -> None:
    info, _ = V2Parser().feed(proxy_header(IPv6Address("TCP", "fe80::1%eth0", 5), OTHER_V6))
    assert where(info.source) == (ip_address("fe80::1"), 5)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        (None, None),
        (object(), V4),
        (IPv4Address("TCP", "no address", 5), V4),
        (UNIXAddress(None), UNIXAddress(b"/run/relay")),
    ],
)
def test_what_has_no_place_in_a_header_is_a_connection_of_our_own(peer: object, host: object) -> None:
    header = proxy_header(peer, host)
    assert header[12:] == b"\x20\x00\x00\x00"
    info, _ = V2Parser().feed(header + b"rest")
    assert (info.source, info.destination) == (None, None)


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """
    A real server, once it listens.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() - began < PATIENCE
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def nginx(folder: Path) -> Iterator[int]:
    """
    An nginx that expects PROXY headers and answers with the client's address.
    """
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{
            access_log off;
            client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
            server {{
                listen 127.0.0.1:{port} proxy_protocol;
                return 200 "$proxy_protocol_addr:$proxy_protocol_port";
            }}
        }}
        """
    )
    with server([require_program("nginx"), "-p", str(folder), "-c", str(config)], port):
        yield port


@contextmanager
def haproxy(folder: Path) -> Iterator[int]:
    """
    An HAProxy that accepts PROXY headers and answers with the client's address.
    """
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(
        textwrap.dedent(f"""
        defaults
            mode http
            timeout connect 5s
            timeout client 5s
            timeout server 5s
        frontend f
            bind 127.0.0.1:{port} accept-proxy
            http-request return status 200 content-type text/plain lf-string "%ci:%cp"
        """)
    )
    with server([require_program("haproxy"), "-db", "-q", "-f", str(config)], port):
        yield port


@pytest.mark.parametrize("backend", [nginx, haproxy])
def test_a_real_server_sees_the_clients_own_address(backend: object, tmp_path: Path) -> None:
    with (
        backend(tmp_path) as port,
        running(
            "connlimit",
            *("--listen", "tcp:0:interface=127.0.0.1"),
            *("--listen", "tcp6:0:interface=\\:\\:1"),
            *("--listen", f"unix:{tmp_path / 'relay'}"),
            *("--forward", f"tcp:127.0.0.1:{port}", "--send-proxy", "--max-connections", "5"),
        ) as program,
    ):
        program.wait_for(r"(?s)starting on .*starting on .*starting on ")
        numbers = [int(word) for word in re.findall(r"starting on (\d+)", program.output)]
        for host, number in zip(("127.0.0.1", "::1"), numbers, strict=True):
            with closing(socket.create_connection((host, number), PATIENCE)) as client:
                client.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
                answer = read_all(client)
                assert answer.endswith(f"{host}:{client.getsockname()[1]}".encode()), answer
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(tmp_path / "relay"))
            client.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
            assert b" 200 " in read_all(client)


def test_the_client_that_a_header_has_told_of_is_told_on(tmp_path: Path) -> None:
    with (
        nginx(tmp_path) as port,
        running(
            "connlimit",
            *("--listen", "haproxy:tcp:0:interface=127.0.0.1"),
            *("--forward", f"tcp:127.0.0.1:{port}", "--send-proxy", "--max-connections", "5"),
        ) as program,
        closing(socket.create_connection(("127.0.0.1", program.port()), PATIENCE)) as client,
    ):
        client.sendall(b"PROXY TCP4 192.0.2.7 127.0.0.1 4567 80\r\nGET / HTTP/1.0\r\n\r\n")
        assert read_all(client).endswith(b"192.0.2.7:4567")
