"""
URLs, as they can be shown.
"""

from __future__ import annotations

import re


def masked(url: str) -> str:
    """
    A URL, perhaps a mistyped one, as it can be shown: without whatever may be a password.
    """
    head, scheme, rest = re.split(r"^([A-Za-z][A-Za-z0-9+.-]*:/*|/*)", url, maxsplit=1)
    where, mark, query = rest.partition("?")
    if "@" in rest:
        mask, at = "***@", rest.rindex("@") + 1
        where, mark, query = rest[at:].partition("?")
    else:
        mask = ""
    if "[" not in where:
        where = re.sub(r":(?!\d*([/,]|$))[^/]*", ":***", where)
    query = re.sub(r"((?:^|&)[^=&]*pass[^=&]*(?<!_file)=)[^&]*", r"\1***", query)
    return f"{head}{scheme}{mask}{where}{mark}{query}"
