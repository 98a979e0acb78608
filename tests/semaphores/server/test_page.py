"""
The page of the server of semaphores, and answers that are large.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from connlimit.semaphores.server import page
from connlimit.semaphores.server.http.messages import HTML
from connlimit.semaphores.server.http.shared import Shared


def facts(count: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"<b>&amp; {number}<!--rows-->",
            "full_count": 3,
            "level": 1,
            "acquired": 2,
            "pending": 4,
            "longest_pending": 5.4,
        }
        for number in range(count)
    ]


def test_whatever_a_semaphore_is_called_is_text() -> None:
    text = b"".join(page.welcome(facts(1))).decode()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text)
    assert cells[-6:] == ["&lt;b&gt;&amp;amp; 0&lt;!--rows--&gt;", "3", "1", "2", "4", "5 s"]
    assert "<b>" not in text
    assert text.startswith("<!DOCTYPE html>\n<html")


def test_a_page_of_few_semaphores_is_one_piece_and_one_of_many_is_made_bit_by_bit() -> None:
    for count, pieces in ((0, 1), (1, 1), (50, 1), (51, 2), (1000, 20)):
        made = list(page.welcome(facts(count)))
        text = b"".join(made)
        assert len(made) == pieces
        assert text.count(b'scope="row"') == count
        assert (text.count(b"<html"), text.count(b"</html>\n")) == (1, 1)
    assert b"There are none yet." in b"".join(page.welcome([]))


def test_a_large_answer_is_made_once_for_all_who_ask_and_no_further_than_they_read() -> None:
    made = []

    def make() -> Iterator[bytes]:
        for number in range(4):
            made.append(number)
            yield b"%d" % number

    shared = Shared()
    first, second = (iter(shared.answer("page", make, HTML).body) for _ in range(2))
    assert [next(first) for _ in range(3)] == [b"0", b"1", b"2"]
    assert made == [0, 1, 2]
    assert list(second) == [b"0", b"1", b"2", b"3"]
    assert list(first) == [b"3"]
    assert made == [0, 1, 2, 3]


def test_a_small_answer_is_made_for_each_who_asks() -> None:
    made = iter((b"one", b"two"))
    shared = Shared()
    assert [shared.answer("page", lambda: iter([next(made)]), HTML).body for _ in range(2)] == [
        b"one",
        b"two",
    ]
