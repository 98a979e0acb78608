"""
The table of settings: what is right, and the one sentence that tells what is wrong.
"""

from __future__ import annotations

import datetime
import re

import pytest
from support.programs import failing
from support.settings import VALUES
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString

from connlimit import Limiter, refusals
from connlimit._limiter.settings import FIELDS, Settings, load, parse
from connlimit._twistd.command_line import Options

#: What a setting needs besides, and what a limiter needs to be one.
NEEDS = {"max_burst": {"max_rate": 1}, "max_connections": {}, "max_per_peer": {}, "max_rate": {}}


def test_every_setting_is_tried() -> None:
    assert set(VALUES) == set(FIELDS)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_the_same_in_code_and_as_text(name: str) -> None:
    value, text, _, _ = VALUES[name]
    assert parse({name: text}) == {name: value}
    needed = NEEDS.get(name, {})
    assert getattr(Settings().evolve({name: value, **needed}), name) == value
    limiter = Limiter(**{name: value, **needed})
    assert getattr(limiter, name) == value
    setattr(limiter, name, FIELDS[name].default)
    assert getattr(limiter, name) == FIELDS[name].default


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n, values in VALUES.items() for w in values[2]])
def test_a_wrong_value_in_code_changes_nothing_and_gets_one_sentence(name: str, wrong: object) -> None:
    limiter = Limiter(5)
    with pytest.raises((TypeError, ValueError), match=rf"\A{name} must be .+, not .+\Z"):
        limiter.reconfigure(**{"max_connections": 7, name: wrong})
    assert limiter.settings == Settings().evolve({"max_connections": 5})


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n, values in VALUES.items() for w in values[3]])
def test_a_wrong_text_gets_one_sentence_that_names_it_as_the_user_does(name: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"\A--the-setting must be .+, not .+\Z") as caught:
        parse({name: wrong}, lambda name: "--the-setting")
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("name", VALUES)
def test_every_setting_reaches_the_command_line(name: str) -> None:
    value, text, _, _ = VALUES[name]
    options = Options()
    needed = NEEDS.get(name, {"max_connections": 1})
    arguments = {name: text, **needed}
    options.parseOptions([f"--{key.replace('_', '-')}={value}" for key, value in arguments.items()])
    (limiter,) = options.described.limiters.values()
    assert getattr(limiter.settings, name) == value


@pytest.mark.parametrize("name", [name for name in VALUES if name != "name"])
def test_every_setting_reaches_the_endpoint_string(name: str) -> None:
    value, text, _, _ = VALUES[name]
    text = text.replace("\\", r"\\").replace(":", r"\:")
    needed = "".join(f":{key}={value}" for key, value in NEEDS.get(name, {"max_connections": 1}).items())
    endpoint = serverFromString(reactor, f"connlimit:tcp:0:{name}={text}{needed}")
    assert getattr(endpoint.limiter, name) == value


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n, values in VALUES.items() for w in values[3]])
def test_who_writes_text_is_told_nothing_of_python(name: str, wrong: str) -> None:
    for tell in (lambda: parse({name: wrong}), lambda: load(name, wrong)):
        with pytest.raises(ValueError, match=rf"\A{name} must be ") as caught:
            tell()
        assert not re.search(
            r"None|True|False|IRefusal|callable|factory|\(|b'", str(caught.value).partition(", not ")[0]
        )


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("max_connections", True, "true"),
        ("max_connections", {"a": [1, False]}, "{a = [1, false]}"),
        ("max_connections", datetime.date(2026, 1, 2), "2026-01-02"),
        ("name", 5, "5"),
        (
            "exempt",
            ["10.0.0.1/8"],
            "['10.0.0.1/8']; 10.0.0.1/8 has bits beyond its prefix, did you mean 10.0.0.0/8?",
        ),
        (
            "exempt",
            "::1,fe80::1/64",
            "'::1,fe80::1/64'; fe80::1/64 has bits beyond its prefix, did you mean fe80::/64?",
        ),
        ("refusal", "htpp", "'htpp'; did you mean http?"),
        ("order", "lfo", "'lfo'; did you mean lifo?"),
        ("over_peer", "refuze", "'refuze'; did you mean refuse?"),
        ("notice", [5, ""], "[5, '']"),
        ("notice", ["soon", "x"], "['soon', 'x']"),
        ("notice", [5, 5], "[5, 5]"),
    ],
)
def test_a_wrong_value_of_a_file_is_shown_as_it_stands_there(name: str, value: object, shown: str) -> None:
    with pytest.raises(ValueError, match=rf", not {re.escape(shown)}\Z"):
        load(name, value)


def test_a_file_gives_a_notice_as_a_text_or_as_a_list() -> None:
    notices = [load("notice", value) for value in ("5s wait", [5, "wait"], ["5s", "wait"])]
    assert notices == [(5, b"wait")] * 3


def test_the_help_shows_every_choice_and_default_and_nothing_of_python() -> None:
    help = " ".join(Options().getUsage(100).split("Commands:")[0].split())
    assert "[fifo, lifo, fair or adaptive; default: fifo]" in help
    assert f"[{', '.join(refusals.NAMED)}, or say TEXT; default: close]" in help
    assert "[wait or refuse; default: wait]" in help
    assert "[seconds; default: 0.5]" in help
    assert "32,64]" in help
    assert not re.search(r"None|True|False|[a-z]_[a-z]", help)


def test_a_burst_needs_a_rate() -> None:
    with pytest.raises(ValueError, match=r"\Amax_burst needs max_rate, how many begin in a second\Z"):
        Limiter(5, max_burst=5)
    limiter = Limiter(max_rate=5, max_burst=5)
    with pytest.raises(ValueError, match="max_burst needs max_rate"):
        limiter.reconfigure(max_rate=None, max_burst=10)
    assert (limiter.max_rate, limiter.max_burst) == (5, 5)
    limiter.max_rate = None  # one that is left when the rate is lifted does no harm


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--order", "random"], ["--order", "fifo, lifo, fair or adaptive", "'random'"]),
        (
            ["--refusal", "htpp"],
            ["--refusal", *map(str, refusals.NAMED), "'say TEXT'", "not 'htpp'; did you mean http?"],
        ),
        (["--peer-prefix", "33,64"], ["--peer-prefix", "0 to 32", "such as 32,64", "'33,64'"]),
        (["--exempt", "localhost"], ["--exempt", "IP networks", "'localhost'"]),
        (["--exempt", "10.0.0.1/8"], ["10.0.0.1/8 has bits beyond its prefix, did you mean 10.0.0.0/8?"]),
        (["--when-full", "stop"], ["--when-full must be refuse or stop-accepting", "not 'stop'"]),
        (["--max-rate", "0"], ["--max-rate must be a number above 0, or none for no limit, not '0'"]),
        (["--max-per-peer", "0"], ["--max-per-peer must be a whole number, 1 or more, or none for no limit"]),
        (["--max-burst", "5"], ["--max-burst needs --max-rate"]),
        (["--notice", "5"], ["--notice must be a time above 0 and what is said then", "not '5'"]),
        (
            ["--max-waiting", "5"],
            ["nothing would be limited: give --max-connections, --max-per-peer, --max-rate or --shared"],
        ),
    ],
)
def test_on_the_command_line_nothing_is_started(arguments: list[str], words: list[str]) -> None:
    sentence = failing("connlimit", *arguments, "--listen=tcp:0", "--forward=tcp:localhost:1")
    for word in words:
        assert word in sentence
