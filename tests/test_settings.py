"""
The table of settings: what is right, and the one sentence that tells what is wrong.
"""

from __future__ import annotations

import pytest
from support import failing
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString

from connlimit import Limiter, refusals
from connlimit._peers import exempt_or_none
from connlimit._settings import FIELDS, Settings, parse
from connlimit._tap import Options

#: For each setting: a value, the same as text, and wrong values in code and as text.
VALUES: dict[str, tuple[object, str, list[object], list[str]]] = {
    "max_connections": (100, "100", [-1, 1.5, "1", True], ["-1", "1.5", "many", ""]),
    "max_per_peer": (5, "5", [-1, "5"], ["-1", "x"]),
    "peer_prefix": (
        (24, 56),
        "24,56",
        [(33, 64), (32, 129), (-1, 0), 24, (1, 2, 3), "24"],
        ["33,64", "24", "a,b"],
    ),
    "over_peer": ("refuse", "refuse", ["reject", None, 1], ["reject", ""]),
    "max_rate": (2.5, "2.5", [0, -1, float("inf"), float("nan"), "2"], ["0", "-1", "nan", "fast"]),
    "max_burst": (7, "7", [-1, 1.5], ["-1", "1.5"]),
    "max_waiting": (None, "none", [-1, "none"], ["-1", "lots"]),
    "wait_timeout": (30, "30", [0, -1, float("nan"), "30"], ["0", "-3", "30x", "s"]),
    "order": ("adaptive", "adaptive", ["random", None, 5], ["random", ""]),
    "adaptive_target": (0.1, "0.1", [0, None, "x"], ["0", "none"]),
    "adaptive_interval": (5, "5", [0, -1, None], ["-1", "none"]),
    "departed_on_half_close": (True, "yes", [1, "yes", None], ["perhaps", ""]),
    "notice": ((5, b"wait\r\n"), r"5 wait\r\n", [(0, b"x"), (5, "text"), 5, (5,)], ["now wait", "0 wait"]),
    "idle_timeout": (60, "60", [0, -1], ["0", "x"]),
    "exempt": (
        exempt_or_none(["127.0.0.0/8", "::1"]),
        "127.0.0.0/8, ::1",
        ["127.0.0.1", ["127.0.0.1/33"], ["host"], 5],
        ["host", "127.0.0.1/8"],
    ),
    "refusal": (refusals.HTTP, "http", ["htpp", 5, None], ["htpp", ""]),
    "dry_run": (True, "on", ["on", 1], ["maybe"]),
    "name": ("web", "web", ["", 5], [""]),
}


def test_every_setting_is_tried() -> None:
    assert set(VALUES) == set(FIELDS)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_the_same_in_code_and_as_text(name: str) -> None:
    value, text, _, _ = VALUES[name]
    assert parse({name: text}) == {name: value}
    assert getattr(Settings().evolve({name: value}), name) == value
    limiter = Limiter(**{name: value})
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
    options.parseOptions([f"--{name.replace('_', '-')}={text}"])
    assert options["settings"][name] == value


@pytest.mark.parametrize("name", [name for name in VALUES if name != "name"])
def test_every_setting_reaches_the_endpoint_string(name: str) -> None:
    value, text, _, _ = VALUES[name]
    text = text.replace("\\", r"\\").replace(":", r"\:")
    endpoint = serverFromString(reactor, f"connlimit:tcp:0:{name}={text}")
    assert getattr(endpoint.limiter, name) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--order", "random"], ["--order", "fifo, lifo, fair or adaptive", "'random'"]),
        (["--refusal", "htpp"], ["--refusal", "'htpp'"]),
        (["--peer-prefix", "33,64"], ["--peer-prefix", "0 to 32", "'33,64'"]),
        (["--exempt", "localhost"], ["--exempt", "IP networks", "'localhost'"]),
        (["--when-full", "panic"], ["--when-full must be refuse or stop-accepting", "'panic'"]),
        (["--max-rate", "0"], ["--max-rate", "'0'"]),
    ],
)
def test_on_the_command_line_nothing_is_started(arguments: list[str], words: list[str]) -> None:
    sentence = failing("connlimit", *arguments, "--listen=tcp:0", "--forward=tcp:localhost:1")
    for word in words:
        assert word in sentence
