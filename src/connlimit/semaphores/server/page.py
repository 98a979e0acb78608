"""
What the semaphores' server shows to people.
"""

from __future__ import annotations

import struct
from html import escape
from typing import Any

#: What the page may load: nothing but its own icon.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

HEADERS = (("Content-Security-Policy", _POLICY),)

NOT_FOUND = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>404 - Not Found</title></head>
<body><h1>404 - Not Found</h1><p>Sorry, the requested page does not exist.</p></body>
</html>
"""

_WELCOME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>connlimit semaphores</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: right; padding: .25rem .5rem; border-bottom: 1px solid }}
th:first-child {{ text-align: left; overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>Hello from Throttle!</h1>
<p>These are the semaphores that connlimit serves here, by the protocol of Throttle.</p>
{table}
<p><a href="peers/">peers</a> · <a href="metrics">metrics</a> · <a href="health">health</a> ·
<a href="version">version</a></p>
</body>
</html>
"""

_COLUMNS = ("semaphore", "full count", "level", "acquired", "pending", "longest pending")


def welcome(facts: list[dict[str, Any]]) -> str:
    """
    The page at the root.

    :param facts: what there is to tell of each semaphore.
    """
    if not facts:
        return _WELCOME.format(table="<p>There are none yet.</p>")
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{escape(each["name"])}</th>'
        f"<td>{each['full_count']}</td><td>{each['level']}</td><td>{each['acquired']}</td>"
        f"<td>{each['pending']}</td><td>{each['longest_pending']:.0f} s</td></tr>"
        for each in facts
    )
    return _WELCOME.format(table=f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


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
