"""
What a request asks for: its path, its query and its body, or what is wrong with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

from connlimit._system.durations import duration
from connlimit.semaphores.server.http.messages import TEXT, TOO_LONG, Answer, Request

_U64 = 2**64
_I64 = 2**63

#: The counts that most locks have, as JSON.
_NUMBERS = {b"%d" % number: number for number in range(1, 100)}

#: How long a query may be that is remembered.
_SHORT = 200


class Refused(Exception):
    """
    A request that is none of the protocol's.

    :ivar answer: what it is answered.
    """

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.answer = Answer(status, f"{text}\n".encode(), TEXT, headers)


Query = Mapping[bytes, list[bytes]]


def parts_of(target: bytes) -> tuple[list[bytes], Query]:
    """
    The parts of a path, and the query.
    """
    path, _, query = target.partition(b"?")
    if not path.startswith(b"/") and b"://" in path:
        # As it is sent to a proxy: with the scheme and the host.
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    path = path[1:]
    parts = path.split(b"/")
    if b"%" in path:
        parts = [unquote_to_bytes(part) for part in parts]
    if not query:
        return parts, {}
    return parts, _remembered(query) if len(query) <= _SHORT else _fields_of(query)


def _fields_of(query: bytes) -> Query:
    fields: dict[bytes, list[bytes]] = {}
    for field in query.split(b"&"):
        name, _, value = field.replace(b"+", b" ").partition(b"=")
        fields.setdefault(unquote_to_bytes(name), []).append(unquote_to_bytes(value))
    return fields


def name_of(text: bytes) -> str:
    """
    The name of a semaphore; if it is not UTF-8, one that no semaphore has.
    """
    return text.decode(errors="replace")


_remembered = lru_cache(1024)(_fields_of)


def query_duration(query: Query, name: bytes) -> float | None:
    """
    A duration in a query, in seconds; None if there is none of that name.

    :raises Refused: if it is wrong.
    """
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise Refused(400, f"the query must say {name.decode()} once")
    return _duration(name, values[0])


@lru_cache(1024)
def _duration(name: bytes, value: bytes) -> float:
    try:
        return duration(name.decode(), value.decode(errors="replace"))
    except ValueError as error:
        raise Refused(400, str(error)) from None


def query_name(query: Query) -> str:
    """
    The semaphore that a query names.

    :raises Refused: if it names none, or several.
    """
    names = query.get(b"semaphore", [])
    if len(names) != 1:
        raise Refused(400, "the query must name one semaphore, such as ?semaphore=A")
    return name_of(names[0])


def peer_number(text: bytes) -> int:
    """
    The number of a peer.

    :raises Refused: if it is none.
    """
    number = int(text) if text.isdigit() and len(text) <= 20 else _U64
    if number < _U64:
        return number
    raise Refused(400, f"a peer is a whole number of 64 bits, not {name_of(text)[:40]!r}")


def count_of(request: Request) -> int:
    """
    The count of a lock, which a request has for a body.

    :raises Refused: if it is none.
    """
    count = _body(request)
    if not _is_count(count):
        raise Refused(422, "the body must be a whole number, the count of the lock, such as 1")
    return int(count)


def expiry_of(request: Request) -> float:
    """
    How many seconds a request says that a peer has.

    :raises Refused: if it says it wrong, or not at all.
    """
    return _expires_in(_fields(request, {"expires_in"}))


def restored_by(request: Request) -> tuple[int, float, dict[str, int]]:
    """
    Which peer a request says there was, how many seconds it has, and what it holds.

    :raises Refused: if it does not say that.
    """
    fields = _fields(request, {"expires_in", "peer_id", "acquired"})
    peer, acquired = fields["peer_id"], fields["acquired"]
    if type(peer) is not int or not 0 <= peer < _U64:
        raise Refused(422, "peer_id must be a whole number of 64 bits")
    if not isinstance(acquired, dict) or not all(map(_is_count, acquired.values())):
        raise Refused(422, 'acquired must have the count of each lock, such as {"A": 1}')
    return peer, _expires_in(fields), acquired


def _is_count(value: object) -> bool:
    return type(value) is int and -_I64 <= value < _I64


def _expires_in(fields: dict[str, Any]) -> float:
    try:
        return duration("expires_in", fields["expires_in"])
    except ValueError as error:
        raise Refused(422, str(error)) from None


def _fields(request: Request, names: set[str]) -> dict[str, Any]:
    body = _body(request)
    if not isinstance(body, dict) or not names <= body.keys():
        raise Refused(422, f"the body must be a JSON object with {' and '.join(sorted(names))}")
    return body


def _body(request: Request) -> Any:
    """
    The JSON that a request has for a body.
    """
    if request.is_too_long:
        raise Refused(413, TOO_LONG)
    kind = request.header(b"Content-Type")
    if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
        raise Refused(415, "the request needs a body with Content-Type: application/json")
    if request.body in _NUMBERS:
        return _NUMBERS[request.body]
    try:
        return _JSON.decode(request.body.decode())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body must be JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    An object of JSON, which has each name once: otherwise others may read it in another way.
    """
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Refused(422, f"the body must have {name[:40]!r} once")
        fields[name] = value
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_object)
