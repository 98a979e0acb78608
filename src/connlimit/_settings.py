"""
The one table of a limiter's settings, from which code, command line and endpoint string take theirs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from connlimit._line import ORDERS
from connlimit._peers import exempt_or_none, prefix_lengths
from connlimit.refusals import close, refusal_of, unescaped

C = TypeVar("C", bound=type)


@attrs.frozen
class _Kind:
    """
    What values a setting may have, in code and as text.

    :ivar right: the values that would be right, as the end of a sentence.
    :ivar convert: makes the setting's value of one that is given in code; TypeError or ValueError if that is
        impossible.
    :ivar parse: makes a value for *convert* of a text; ValueError if that is impossible.
    """

    right: str
    convert: Callable[[Any], Any]
    parse: Callable[[str], Any]

    def wrong(self, name: str, value: object) -> str:
        """
        The sentence that tells of a wrong value.
        """
        return f"{name} must be {self.right}, not {value!r}"


def _number(
    *types: type, fits: Callable[[Any], bool], optional: bool = True
) -> tuple[Callable[[Any], Any], Callable[[str], Any]]:
    """
    How a number is checked and parsed.
    """

    def convert(value: Any) -> Any:
        if optional and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, types):
            raise TypeError
        if not fits(value):
            raise ValueError
        return value

    def parse(text: str) -> Any:
        return None if optional and text.lower() == "none" else types[-1](text)

    return convert, parse


def _above_zero(value: float) -> bool:
    return 0 < value < math.inf


def _one_of(*choices: str) -> _Kind:
    def convert(value: Any) -> Any:
        if value not in choices:
            raise ValueError
        return value

    return _Kind(f"{', '.join(choices[:-1])} or {choices[-1]}", convert, str)


def _order(value: Any) -> Any:
    if isinstance(value, str) and value not in ORDERS:
        raise ValueError
    if not isinstance(value, str) and not callable(value):
        raise TypeError
    return value


_ORDER = attrs.evolve(_one_of(*ORDERS), convert=_order)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _parse_flag(text: str) -> bool:
    return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}[text.lower()]


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value:
        raise ValueError
    return value


def _notice(value: Any) -> Any:
    if value is None:
        return None
    after, what = value
    if isinstance(after, bool) or not isinstance(after, (int, float)) or not _above_zero(after):
        raise ValueError
    if not isinstance(what, bytes) and not callable(what):
        raise TypeError
    return after, what


def _parse_notice(text: str) -> Any:
    if text.lower() == "none":
        return None
    after, _, what = text.partition(" ")
    return float(after), unescaped(what)


def seconds(text: str) -> float:
    """
    The seconds that a text stands for, such as ``30``, ``30s``, ``500ms``, ``5min``, ``2h`` or ``1d``.

    :raises ValueError: if it stands for none.
    """
    match = re.fullmatch(r"([^a-z]+?)\s*(ms|s|min|h|d)?", text.strip())
    if match is None:
        raise ValueError(text)
    number = float(match[1])
    return number * _UNITS[match[2]] if match[2] else number


_UNITS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}


def _seconds_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else seconds(text)


_COUNT = _Kind(
    "a whole number, 0 or more, or None for no limit", *_number(int, fits=lambda value: value >= 0)
)
_SECONDS_OR_NONE = _Kind(
    "a number of seconds above 0 (as text also 30s or 5min), or None for no limit",
    _number(int, float, fits=_above_zero)[0],
    _seconds_or_none,
)
_SECONDS = _Kind(
    "a number of seconds above 0 (as text also 30s or 5min)",
    _number(int, float, fits=_above_zero, optional=False)[0],
    seconds,
)
_RATE = _Kind("a number above 0, or None for no limit", *_number(int, float, fits=_above_zero))
_FLAG = _Kind("True or False (as text: yes or no)", _flag, _parse_flag)
_PREFIX = _Kind(
    "the prefix lengths of IPv4, 0 to 32, and IPv6, 0 to 128, such as (32, 64)",
    prefix_lengths,
    lambda text: tuple(int(part) for part in text.split(",")),
)
_EXEMPT = _Kind(
    "IP networks, such as 127.0.0.0/8,::1, or a callable that is given an address",
    exempt_or_none,
    lambda text: [part.strip() for part in text.split(",") if part.strip()],
)
_REFUSAL = _Kind(
    "close, reset, the name of a protocol (http, smtp, ftp, …), 'say TEXT', an IRefusal or a factory",
    refusal_of,
    str,
)
_NOTICE = _Kind(
    "seconds above 0 and what is said then, such as (5, b'please wait'), or None", _notice, _parse_notice
)
_NAME = _Kind("a text of at least one character", _name, str)


def _setting(default: Any, kind: _Kind, unit: str, help: str) -> Any:
    return attrs.field(default=default, metadata={"kind": kind, "unit": unit, "help": help})


@attrs.frozen(kw_only=True)
class Settings:
    """
    Everything that can be set about a limiter, and changed while it runs.
    """

    max_connections: int | None = _setting(
        None, _COUNT, "connections", "how many connections are served at once"
    )
    max_per_peer: int | None = _setting(
        None, _COUNT, "connections", "how many connections of one peer are served at once"
    )
    peer_prefix: tuple[int, int] = _setting(
        (32, 64), _PREFIX, "bits, bits", "how much of an IPv4 and of an IPv6 address makes a peer"
    )
    over_peer: str = _setting(
        "wait",
        _one_of("wait", "refuse"),
        "",
        "what becomes of a connection whose peer is at its cap: it waits, or is refused",
    )
    max_rate: float | None = _setting(
        None, _RATE, "per second", "how many connections begin to be served in a second"
    )
    max_burst: int | None = _setting(
        None,
        _COUNT,
        "connections",
        "how many of these may begin at once; None: as many as in a second, at least 1",
    )
    max_waiting: int | None = _setting(
        None,
        _COUNT,
        "connections",
        "how many connections may wait in the line; None: as many as the descriptors allow",
    )
    wait_timeout: float | None = _setting(
        None, _SECONDS_OR_NONE, "seconds", "how long a connection may wait before it is refused"
    )
    order: Any = _setting("fifo", _ORDER, "", "whose turn it is: the order of the line")
    adaptive_target: float = _setting(
        0.5, _SECONDS, "seconds", "order adaptive: the wait above which the line is too long"
    )
    adaptive_interval: float = _setting(
        10.0, _SECONDS, "seconds", "order adaptive: for how long it may be too long before that is overload"
    )
    departed_on_half_close: bool = _setting(
        False, _FLAG, "", "whether a waiting client that closes its direction, having sent data, has departed"
    )
    notice: tuple[float, Any] | None = _setting(
        None, _NOTICE, "seconds, text", "what a waiting client is told once, after so many seconds"
    )
    idle_timeout: float | None = _setting(
        None,
        _SECONDS_OR_NONE,
        "seconds",
        "while somebody waits, close a served connection that moved no byte for so long (Linux)",
    )
    exempt: Any = _setting(None, _EXEMPT, "networks", "peers that are always served at once and take no slot")
    refusal: Any = _setting(close, _REFUSAL, "", "what a refused client gets")
    dry_run: bool = _setting(
        False, _FLAG, "", "serve everybody, and report who would have waited or been refused"
    )
    name: str = _setting("default", _NAME, "", "what the limiter is called in logs and metrics")

    def evolve(self, changes: Mapping[str, Any]) -> Settings:
        """
        These settings with some of them changed.

        :raises TypeError: for an unknown setting or a value of a wrong type.
        :raises ValueError: for a wrong value.
        """
        return attrs.evolve(self, **{name: _converted(name, value) for name, value in changes.items()})


FIELDS: Mapping[str, attrs.Attribute[Any]] = attrs.fields_dict(Settings)


def _converted(name: str, value: Any) -> Any:
    if name not in FIELDS:
        nearest = difflib.get_close_matches(name, FIELDS, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(FIELDS)}"
        raise TypeError(f"{name} is not a setting; {hint}")
    kind: _Kind = FIELDS[name].metadata["kind"]
    try:
        return kind.convert(value)
    except (TypeError, ValueError) as error:
        raise type(error)(kind.wrong(name, value)) from None


def parse(texts: Mapping[str, str], spell: Callable[[str], str] = str) -> dict[str, Any]:
    """
    The values of settings that were given as text.

    :param texts: the text given for each setting, by its name in `Settings`.
    :param spell: how the user spells a setting's name.
    :raises ValueError: for a wrong value, naming the setting as the user spells it.
    """
    values = {}
    for name, text in texts.items():
        kind: _Kind = FIELDS[name].metadata["kind"]
        try:
            values[name] = kind.convert(kind.parse(text))
        except (KeyError, TypeError, ValueError):
            raise ValueError(kind.wrong(spell(name), text)) from None
    return values


def load(name: str, value: Any) -> Any:
    """
    The value of a setting that a configuration file gives, as text or otherwise.

    :raises TypeError: for a wrong value.
    :raises ValueError: likewise.
    """
    kind: _Kind = FIELDS[name].metadata["kind"]
    given = value
    try:
        if isinstance(value, str):
            given = kind.parse(value)
        elif isinstance(value, list):
            # The only texts that are bytes in code are what is said to clients.
            given = [
                unescaped(each) if name == "notice" and isinstance(each, str) else each for each in value
            ]
        return kind.convert(given)
    except (KeyError, TypeError, ValueError):
        raise ValueError(kind.wrong(name, value)) from None


def adjustable(cls: C) -> C:
    """
    Give a class that has ``settings`` and ``reconfigure`` an attribute for each setting.
    """
    for name, field in FIELDS.items():
        setattr(cls, name, _property(name, field.metadata))
    return cls


def _property(name: str, metadata: Mapping[str, Any]) -> property:
    unit = f" ({metadata['unit']})" if metadata["unit"] else ""
    return property(
        lambda self: getattr(self.settings, name),
        lambda self, value: self.reconfigure(**{name: value}),
        doc=f"{metadata['help'].capitalize()}{unit}.",
    )
