"""
Durations as texts.
"""

from __future__ import annotations

import pytest

from connlimit._system.durations import LONGEST, duration, seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300000ms", 300.0),
        ("5min", 300.0),
        ("5m", 300.0),
        ("2h 37min", 9420.0),
        ("1h30m", 5400.0),
        ("1 s", 1.0),
        (" 1s ", 1.0),
        ("1.5s", 1.5),
        ("0", 0.0),
        ("0s", 0.0),
        ("10us", 1e-5),
        ("1week", 604800.0),
        ("1M", 30.44 * 86400),
        ("1y", 365.25 * 86400),
        ("366d", LONGEST),
    ],
)
def test_a_duration_is_a_number_of_seconds(text: str, seconds: float) -> None:
    assert duration("expires_in", text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", ["", " ", "5", "-1s", "1S", "1MIN", "s", "1s x", "1e3s", ".5s", 5, None, ["1s"]]
)
def test_what_is_no_duration_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"expires_in must be a duration such as .*, not "):
        duration("expires_in", value)


@pytest.mark.parametrize("text", ["367d", "18446744073709551615y", "1" * 90 + "s"])
def test_a_duration_is_bounded(text: str) -> None:
    with pytest.raises(ValueError, match="at most 366 days"):
        duration("block_for", text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30", 30),
        (" 30 ", 30),
        (".5", 0.5),
        ("-3", -3),
        ("5min", 300),
        ("5m", 300),
        ("2h 30min", 9000),
        ("500ms", 0.5),
    ],
)
def test_wherever_else_a_number_alone_is_a_number_of_seconds(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", " ", "s", "30x", "nan", "inf", "1e3", "5 5", "-3s", "1" * 200 + "s"])
def test_what_is_no_time_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)
