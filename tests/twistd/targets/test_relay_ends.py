"""
The ends of a relay: nothing is lost, and nothing piles up.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.clients import read_all
from support.patience import PATIENCE
from support.programs import running
from support.relays import LOCAL, RelayTestCase, client_gone, pytest_generate_tests, relayed, way  # noqa: F401  # for pytest

CHUNK = bytes(range(256)) * 1024
GIB = 1 << 30
MIB = 1 << 20


@ensureDeferred
async def test_a_big_answer_before_the_end_arrives_whole() -> None:
    async with relayed() as relay:
        client, backend = await relay.pair()
        answer = b"x" * 3_000_000
        backend.transport.write(answer)
        backend.transport.loseConnection()
        await client.receives(answer)
        await client_gone(relay, client)


class EndTests(RelayTestCase):
    """
    Each end holds the other back.
    """

    def test_each_side_is_the_producer_of_the_other(self) -> None:
        backend = self.answer()
        for consumer, producer in ((self.transport, backend), (backend, self.transport)):
            self.assertTrue(consumer.streaming)
            consumer.producer.pauseProducing()
            self.assertEqual(producer.producerState, "paused")
            consumer.producer.resumeProducing()
            self.assertEqual(producer.producerState, "producing")


# A real process: how much goes through, and how much memory it takes.


@contextmanager
def backend_thread(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """
    A server in a thread, for one connection; yields its endpoint.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(PATIENCE)
                serve(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        thread.join(PATIENCE)
        assert not thread.is_alive()


def pour(connection: socket.socket, count: int) -> None:
    """
    Send so many bytes, and close that direction.
    """
    for _ in range(count // len(CHUNK)):
        connection.sendall(CHUNK)
    connection.shutdown(socket.SHUT_WR)


def drink(connection: socket.socket) -> int:
    """
    Receive until the end; returns how many bytes.
    """
    buffer = bytearray(1 << 18)
    total = 0
    while count := connection.recv_into(buffer):
        total += count
    return total


def both_ways(connection: socket.socket, count: int) -> int:
    """
    Send so many bytes while everything is received; returns how many bytes that was.
    """
    pouring = threading.Thread(target=pour, args=(connection, count))
    pouring.start()
    total = drink(connection)
    pouring.join(PATIENCE)
    return total


def test_a_gibibyte_goes_through_both_ways_at_once_without_piling_up() -> None:
    received = []
    all_received = threading.Event()

    def serve(connection: socket.socket) -> None:
        received.append(both_ways(connection, GIB))
        all_received.set()

    with (
        backend_thread(serve) as backend,
        running("connlimit", "--listen", LOCAL, "--forward", backend, "--max-connections=9") as program,
        socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as client,
        sampled(program.resident_memory) as memory,
    ):
        received.append(both_ways(client, GIB))
        assert all_received.wait(PATIENCE)
    assert received == [GIB, GIB]
    assert max(memory) - memory[0] < 64 * MIB


@contextmanager
def sampled(measure: Callable[[], int]) -> Iterator[list[int]]:
    """
    What a measurement gives at first, every twentieth of a second, and at last.
    """
    values = [measure()]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            values.append(measure())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield values
        values.append(measure())
    finally:
        over.set()
        thread.join()


def test_a_reader_that_stops_reading_stops_the_writer_and_loses_nothing() -> None:
    sent = 0
    stalled = threading.Event()

    def write_until_it_stalls(connection: socket.socket) -> None:
        nonlocal sent
        connection.settimeout(1.0)
        try:
            while True:
                sent += connection.send(CHUNK)
        except TimeoutError:
            stalled.set()

    with (
        backend_thread(write_until_it_stalls) as backend,
        running("connlimit", "--listen", LOCAL, "--forward", backend, "--max-connections=9") as program,
        socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as client,
    ):
        before = program.resident_memory()
        assert stalled.wait(PATIENCE)
        # What was taken is in the kernel's buffers, four of them, and not in the process.
        assert program.resident_memory() - before < 8 * MIB
        assert read_all(client) == (CHUNK * (sent // len(CHUNK) + 1))[:sent]


def test_inside_tls_a_truncated_answer_does_not_end_like_a_whole_one(certificate: Path) -> None:
    def answer(connection: socket.socket) -> None:
        if connection.recv(10) == b"all of it":
            connection.sendall(b"whole")
            return
        connection.sendall(b"truncated")
        time.sleep(0.2)  # so that it arrives: a reset takes what is on its way
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    context = ssl.create_default_context(cafile=str(certificate))
    for question in (b"all of it", b"a part"):
        with (
            backend_thread(answer) as backend,
            running(
                "connlimit",
                *("--listen", f"ssl:0:interface=127.0.0.1:privateKey={certificate}:certKey={certificate}"),
                *("--forward", backend, "--max-connections", "5"),
            ) as program,
            socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as client,
        ):
            client.sendall(question)
            if question == b"all of it":
                assert read_all(client) == b"whole"
            else:
                with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
                    read_all(client)
