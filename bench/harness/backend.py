"""
The server behind the relays that are compared, which costs less than any of them.

python -m bench.harness.backend KIND prints its port and serves; KIND is echo, or source for one that sends
without an end.
"""

from __future__ import annotations

import select
import socket
import sys

_BUFFER = bytearray(1 << 18)


def serve(kind: str) -> None:
    """
    Serve until killed.
    """
    epoll = select.epoll()
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listening.setblocking(False)
    print(listening.getsockname()[1], flush=True)
    epoll.register(listening, select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    interest = select.EPOLLOUT if kind == "source" else select.EPOLLIN
    while True:
        for descriptor, _ in epoll.poll():
            sock = clients.get(descriptor)
            if sock is None:
                _accept(listening, epoll, clients, interest)
                continue
            try:
                if kind == "source":
                    sock.send(_BUFFER)
                    continue
                received = sock.recv_into(_BUFFER)
                if received:
                    sock.send(memoryview(_BUFFER)[:received])
                    continue
            except OSError:
                pass
            del clients[descriptor]
            sock.close()


def _accept(
    listening: socket.socket, epoll: select.epoll, clients: dict[int, socket.socket], interest: int
) -> None:
    while True:
        try:
            sock, _ = listening.accept()
        except OSError:  # nobody is left
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        clients[sock.fileno()] = sock
        epoll.register(sock, interest)


if __name__ == "__main__":
    serve(*sys.argv[1:])
