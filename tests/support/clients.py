"""
Real clients that block, and where they connect to.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import closing

from support.patience import PATIENCE


def free_port() -> int:
    """
    A port that nobody listens on.
    """
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def read_all(client: socket.socket) -> bytes:
    """
    Everything that a socket delivers until its end.
    """
    chunks = []
    while chunk := client.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


def page_until(browser: object, words: str) -> None:
    """
    Wait until a browser shows these words.
    """
    began = time.monotonic()
    while words not in browser.find_element("css selector", "body").text:
        assert time.monotonic() - began < PATIENCE, browser.find_element("css selector", "body").text
        time.sleep(0.1)


def reset(connection: socket.socket) -> None:
    """
    End a connection by a reset.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def port_of(where: str) -> int:
    """
    The port of an endpoint string of clients.
    """
    return int(where.rpartition(":")[2])
