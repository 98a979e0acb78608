"""
What the semaphores' server shows to people.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from twisted.python.failure import Failure
from twisted.web.iweb import IRequest
from twisted.web.template import Comment, Element, Flattenable, Tag, XMLString, flatten, renderer, tags

#: What the page may load: nothing but its own icon.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

HEADERS = (("Content-Security-Policy", _POLICY),)

_DOCTYPE = b"<!DOCTYPE html>\n"

NOT_FOUND = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>404 - Not Found</title></head>
<body><h1>404 - Not Found</h1><p>Sorry, the requested page does not exist.</p></body>
</html>
"""

_TEMPLATE = XMLString((files(__package__) / "static" / "welcome.xml").read_text(encoding="utf-8"))

_COLUMNS = ("semaphore", "full count", "level", "acquired", "pending", "longest pending")

#: How many semaphores are shown by one piece of the page, so that others need not wait for all of it.
_ROWS = 50

#: Where the rows stand: no text can look like this once it is escaped.
_PLACE = "rows"


class _Welcome(Element):
    """
    The page at the root.
    """

    loader = _TEMPLATE

    def __init__(self, table: Flattenable) -> None:
        super().__init__()
        self._table = table

    @renderer
    def filled(self, request: IRequest | None, tag: Tag) -> Tag:
        """
        The page with its table.
        """
        return tag.fillSlots(table=self._table)


def welcome(facts: list[dict[str, Any]]) -> Iterator[bytes]:
    """
    The page at the root, piece by piece.

    :param facts: the facts of each semaphore.
    """
    if not facts:
        yield _DOCTYPE + _flat(_Welcome(tags.p("There are none yet."))) + b"\n"
        return
    head = tags.thead(tags.tr([tags.th(column, scope="col") for column in _COLUMNS]))
    page = _flat(_Welcome(tags.table(head, tags.tbody(Comment(_PLACE)))))
    before, _, after = page.partition(b"<!--%b-->" % _PLACE.encode())
    for at in range(0, len(facts), _ROWS):
        is_last = at + _ROWS >= len(facts)
        rows = _flat([_row(each) for each in facts[at : at + _ROWS]])
        yield (b"" if at else _DOCTYPE + before) + rows + (after + b"\n" if is_last else b"")


def _row(facts: dict[str, Any]) -> Tag:
    cells = [str(facts[each]) for each in ("full_count", "level", "acquired", "pending")]
    cells.append(f"{facts['longest_pending']:.0f} s")
    return tags.tr(tags.th(facts["name"], scope="row"), [tags.td(cell) for cell in cells])


def _flat(what: Flattenable) -> bytes:
    """
    What it is in bytes; nothing in it takes time.
    """
    pieces: list[bytes] = []
    flatten(None, what, pieces.append).addErrback(Failure.raiseException)
    return b"".join(pieces)


def _icon() -> bytes:
    """
    A half open door in 16 by 16 pixels, as a Windows icon.
    """
    frame, door = b"\x50\x40\x30\xff", b"\x40\xa0\xf0\xff"
    rows = []
    for y in range(16):
        row = [frame if x in (2, 13) or y in (0, 15) else b"\0\0\0\0" for x in range(16)]
        if y not in (0, 15):
            row[3:9] = [door] * 6
        rows.append(b"".join(row))
    pixels = b"".join(rows) + bytes(16 * 4)  # and a mask that hides nothing
    header = struct.pack("<IiiHHIIiiII", 40, 16, 32, 1, 32, 0, len(pixels), 0, 0, 0, 0)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(header) + len(pixels), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + header + pixels


ICON = _icon()
