"""
The kinds of values: each is checked alike in code, as text and in a file.
"""

from __future__ import annotations

import re

import pytest

from connlimit._limiter.values import FLAG, RATE, SECONDS, Kind, duration, one_of, text, texts, whole_number


@pytest.mark.parametrize(
    ("kind", "given", "as_text", "value"),
    [
        (whole_number(1), 5, "5", 5),
        (whole_number(0).or_none(), None, "none", None),
        (SECONDS, 90, "1min 30s", 90),
        (duration(), 0, "0", 0),
        (duration(0.5, 3600), 0.5, "500ms", 0.5),
        (RATE, 2.5, "2.5", 2.5),
        (FLAG, True, "yes", True),
        (one_of("one", "two"), "two", "two", "two"),
        (text(), "x", "x", "x"),
        (texts("texts"), ["x"], "x", ("x",)),
    ],
)
def test_a_value_is_the_same_in_code_as_text_and_in_a_file(
    kind: Kind, given: object, as_text: str, value: object
) -> None:
    assert kind.of_code("it", given) == kind.of_text("it", as_text) == value
    assert kind.of_file("it", as_text) == value
    if given is not None:
        assert kind.of_file("it", given) == value


@pytest.mark.parametrize(
    ("kind", "wrong", "sentence"),
    [
        (whole_number(1, 9), 10, "it must be a whole number from 1 to 9, not 10"),
        (whole_number(1), True, "it must be a whole number, 1 or more, not true"),
        (SECONDS, 0, "it must be a time above 0, such as 30, 500ms, 30s or 5min, not 0"),
        (SECONDS, 10**400, f"it must be a time above 0, such as 30, 500ms, 30s or 5min, not {10**400}"),
        (
            duration(1),
            "0.5",
            "it must be a time of 1 second or more, such as 30, 500ms, 30s or 5min, not '0.5'",
        ),
        (
            duration(0.5, 3600),
            "2h",
            "it must be a time from 0.5 to 3600 seconds, such as 30, 500ms, 30s or 5min, not '2h'",
        ),
        (FLAG, "maybe", "it must be yes or no, true or false, not 'maybe'"),
        (FLAG, 1, "it must be yes or no, true or false, not 1"),
        (one_of("one", "three"), "thre", "it must be one or three, not 'thre'; did you mean three?"),
        (text("a word"), "", "it must be a word, not ''"),
        (texts("a word, or several"), [], "it must be a word, or several, not []"),
        (texts("a word, or several"), ["a", 5], "it must be a word, or several, not ['a', 5]"),
    ],
)
def test_a_wrong_value_gets_one_sentence_with_its_name_and_what_is_right(
    kind: Kind, wrong: object, sentence: str
) -> None:
    with pytest.raises(ValueError, match=rf"\A{re.escape(sentence)}\Z"):
        kind.of_file("it", wrong)
    with pytest.raises((TypeError, ValueError), match=r"\Ait must be .*, not "):
        kind.of_code("it", wrong)
