"""
Every byte that the server of semaphores sends.

What is right was recorded from the server when it was built on twisted.web. Left out is the header that named
that; a 422 has its proper phrase, the policy of the page stands after the other headers, the tags of the
page are closed as XML has it, a name that is not UTF-8 is one that no semaphore has, and a duration is there
once and with a value.
"""

from __future__ import annotations

import json
import re
import socket
from contextlib import closing
from pathlib import Path

from support.clients import read_all
from support.patience import PATIENCE
from support.semaphores import Server, ours

RECORDED = json.loads((Path(__file__).parent / "wire.json").read_text())

FILE = """
[semaphores]
A = 5
B = { max = 5, level = 1 }
C = { max = 1, level = 2 }
"/&" = 2
"a b" = 3
"a+b" = 4
"""

#: A last request, which shows that the connection is kept, and that nothing else was sent.
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def exchange(server: Server, sent: bytes) -> tuple[str, bool]:
    """
    What is answered, and whether the connection is closed with it.
    """
    with closing(socket.create_connection(("127.0.0.1", server.port), PATIENCE)) as client:
        answers = b""
        head, _, body = sent.partition(b"\r\n\r\n")
        if b"Expect:" in head:
            client.sendall(head + b"\r\n\r\n")
            answers = client.recv(4096)
            sent = body
        client.sendall(sent + LAST)
        answers += read_all(client)
    found, closing_head, last = answers.rpartition(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")
    is_open = bool(found) and last.endswith(b"\r\n\r\nOk")
    return (found if is_open else answers).decode("latin-1"), not is_open


def test_each_answer_is_the_same_to_the_byte(tmp_path: Path) -> None:
    peers: list[str] = []
    with ours(tmp_path, text=FILE) as server:
        for step in RECORDED:
            sent = step["sent"]
            for index, peer in enumerate(peers):
                sent = sent.replace(f"{{{index}}}", peer)
            answer, closes = exchange(server, sent.encode("latin-1"))
            if sent.startswith("POST /new_peer") and " 200 OK" in answer:
                peers.append(answer.rpartition("\r\n\r\n")[2])
            for index, peer in enumerate(peers):
                answer = answer.replace(peer, f"{{{index}}}")
            answer = re.sub(r"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r", "Date: DATE\r", answer)
            if re.search(r"\r\n\r\n\{\d+\}\Z", answer):
                answer = re.sub(r"Content-Length: \d+\r", "Content-Length: PEER\r", answer)
            assert (answer, closes) == (step["answer"], step["closes"]), step["sent"]
