"""
A certificate, and TLS with it.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

from twisted.internet.endpoints import (
    _WrapperServerEndpoint,
)
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.protocols.tls import TLSMemoryBIOFactory

from support.programs import require_program


def make_certificate(folder: Path) -> Path:
    """
    Make a private key and its certificate for localhost, both in one file.
    """
    file, key, certificate = folder / "server.pem", folder / "key.pem", folder / "certificate.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run([require_program("openssl"), *command.split()], check=True, capture_output=True)
    file.write_text(key.read_text() + certificate.read_text())
    return file


def talk_tls(port: int, certificate: Path, data: bytes) -> bytes:
    """
    What a TLS client of Python's own receives for the data; blocks.
    """
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        socket.create_connection(("127.0.0.1", port), 20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as client,
    ):
        client.sendall(data)
        received = b""
        while len(received) < len(data) and (chunk := client.recv(65536)):
            received += chunk
        return received


def wrap_server_tls(context: object, endpoint: IStreamServerEndpoint) -> IStreamServerEndpoint:
    """
    What ``wrapServerTLS`` of a newer Twisted makes.
    """
    return _WrapperServerEndpoint(endpoint, lambda factory: TLSMemoryBIOFactory(context, False, factory))
