"""
Answers that are large: made once for all who ask within a second, and written as they read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from time import monotonic
from typing import Any

from connlimit.semaphores.server.http.messages import Answer

#: The longest piece of an answer, in bytes.
_LARGE = 64 * 1024

#: Seconds for which a large answer is kept.
_KEPT = 1.0


class Shared:
    """
    What was made for one who asked, as long as it serves others, too.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[float, Any]] = {}

    def recent(self, name: str) -> Any:
        """
        What was kept by this name within the last second; None if nothing was.
        """
        made, thing = self._made.get(name, (0.0, None))
        if thing is not None and monotonic() - made < _KEPT:
            return thing
        self._made.pop(name, None)
        return None

    def keep(self, name: str, thing: Any) -> Any:
        """
        Have this for all who ask within a second.
        """
        self._made[name] = monotonic(), thing
        return thing

    def answer(
        self,
        name: str,
        make: Callable[[], Iterator[bytes]],
        kind: str,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Answer:
        """
        An answer of one piece, for who asks alone, or of several, which are the same for all.

        :param make: makes the pieces.
        """
        pieces = self.recent(name)
        if pieces is None:
            made = make()
            first, second = next(made, b""), next(made, None)
            if second is None:
                return Answer(200, first, kind, headers)
            pieces = self.keep(name, _Pieces(chain((first, second), made)))
        return Answer(200, iter(pieces), kind, headers)


class _Pieces:
    """
    Pieces that are made once, as the first who reads them needs them.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._made: list[bytes] = []
        self._left = pieces

    def __iter__(self) -> Iterator[bytes]:
        at = 0
        while True:
            if at == len(self._made):
                piece = next(self._left, None)
                if piece is None:
                    return
                self._made.append(piece)
            yield self._made[at]
            at += 1


def pieces_of(text: bytes) -> Iterator[bytes]:
    """
    A text in pieces, if it is large.
    """
    for at in range(0, max(1, len(text)), _LARGE):
        yield text[at : at + _LARGE]
