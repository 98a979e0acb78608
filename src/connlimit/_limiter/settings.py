"""
The one table of a limiter's settings, from which code, command line and endpoint string take theirs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import date, time
from ipaddress import ip_network
from typing import Any, TypeVar

import attrs

from connlimit._limiter.peers import exempt_or_none, prefix_lengths
from connlimit._limiter.queue import ORDERS
from connlimit.refusals import NAMED, close, refusal_of, unescaped

C = TypeVar("C", bound=type)


@attrs.frozen
class _Kind:
    """
    What values a setting may have, in code and as text.

    :ivar in_code: the values that would be right in code, as the end of a sentence.
    :ivar in_text: the texts that would be right, likewise.
    :ivar convert: makes the setting's value of one that is given in code; TypeError or ValueError if that is
        impossible.
    :ivar parse: makes a value for *convert* of a text; ValueError if that is impossible.
    :ivar hint: what may have been meant by a value that is wrong, as a question, or nothing.
    """

    in_code: str
    in_text: str
    convert: Callable[[Any], Any]
    parse: Callable[[str], Any]
    hint: Callable[[Any], str] = lambda value: ""

    def wrong(self, name: str, value: object) -> str:
        """
        The sentence that tells of a wrong value in code.
        """
        return f"{name} must be {self.in_code}, not {value!r}{self._question(value)}"

    def wrong_text(self, name: str, value: object) -> str:
        """
        The sentence that tells of a wrong text, or of a wrong value in a file.
        """
        return f"{name} must be {self.in_text}, not {shown(value)}{self._question(value)}"

    def _question(self, value: object) -> str:
        hint = self.hint(value)
        return f"; {hint}" if hint else ""


def shown(value: object) -> str:
    """
    A value as a text or a file has it.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, bytes):
        return repr(value.decode(errors="backslashreplace"))
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, (date, time)):
        return value.isoformat()
    return repr(value)


def did_you_mean(word: object, choices: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """
    The question whether the nearest of some words was meant, or nothing if none is near.

    :param spell: how the user spells it.
    """
    nearest = difflib.get_close_matches(word, list(choices), 1) if isinstance(word, str) else []
    return f"did you mean {spell(nearest[0])}?" if nearest else ""


def either(choices: Sequence[str]) -> str:
    """
    All choices, as the part of a sentence.
    """
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


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

    right = either(choices)
    return _Kind(right, right, convert, str, lambda value: did_you_mean(value, choices))


def _order(value: Any) -> Any:
    if isinstance(value, str) and value not in ORDERS:
        raise ValueError
    if not isinstance(value, str) and not callable(value):
        raise TypeError
    return value


_NAMED_ORDER = _one_of(*ORDERS)
_ORDER = attrs.evolve(
    _NAMED_ORDER, in_code=f"{_NAMED_ORDER.in_code}, or a callable that makes an order", convert=_order
)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _parse_flag(text: str) -> bool:
    return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}[text.lower()]


def _auto(value: Any) -> bool | str:
    if isinstance(value, str) and value != "auto":
        raise ValueError
    return value if isinstance(value, str) else _flag(value)


def _parse_auto(text: str) -> bool | str:
    return "auto" if text.lower() == "auto" else _parse_flag(text)


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
    if not what:
        raise ValueError
    return after, what


def _parse_notice(text: str) -> Any:
    if text.lower() == "none":
        return None
    after, _, what = text.partition(" ")
    return seconds(after), unescaped(what)


def _parse_networks(text: str) -> Any:
    networks = [part.strip() for part in text.split(",") if part.strip()]
    if not networks:
        raise ValueError
    return None if text.lower() == "none" else networks


def _network_hint(value: Any) -> str:
    """
    Which network was meant, where an address within it was given.
    """
    for each in value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []:
        try:
            network = ip_network(each.strip(), strict=False)
        except (AttributeError, ValueError):
            continue
        if not _is_network(each.strip()):
            return f"{each.strip()} has bits beyond its prefix, did you mean {network}?"
    return ""


def _is_network(text: str) -> bool:
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


def _refusal_hint(value: Any) -> str:
    return did_you_mean(value, [*NAMED, "say TEXT"])


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


def _with_none(right: str, checked: tuple[Callable[[Any], Any], Callable[[str], Any]]) -> _Kind:
    return _Kind(f"{right}, or None for no limit", f"{right}, or none for no limit", *checked)


_COUNT = _with_none("a whole number, 0 or more", _number(int, fits=lambda value: value >= 0))
_COUNT_ABOVE_ZERO = _with_none("a whole number, 1 or more", _number(int, fits=lambda value: value >= 1))
_SECONDS = _Kind(
    "a number of seconds above 0",
    "a time above 0, such as 30, 500ms, 30s or 5min",
    _number(int, float, fits=_above_zero, optional=False)[0],
    seconds,
)
_SECONDS_OR_NONE = _Kind(
    f"{_SECONDS.in_code}, or None for no limit",
    f"{_SECONDS.in_text}, or none for no limit",
    _number(int, float, fits=_above_zero)[0],
    _seconds_or_none,
)
_RATE = _with_none("a number above 0", _number(int, float, fits=_above_zero))
_FLAG = _Kind("True or False", "yes or no, true or false", _flag, _parse_flag)
_AUTO = _Kind("'auto', True or False", "auto, yes or no", _auto, _parse_auto)
_PREFIX = _Kind(
    "the prefix lengths of IPv4, 0 to 32, and IPv6, 0 to 128, such as (32, 64)",
    "the prefix lengths of IPv4, 0 to 32, and IPv6, 0 to 128, such as 32,64",
    prefix_lengths,
    lambda text: tuple(int(part) for part in text.split(",")),
)
_EXEMPT = _Kind(
    "IP networks, such as ['127.0.0.0/8', '::1'], or a callable that is given an address",
    "IP networks, such as 127.0.0.0/8,::1, or none",
    exempt_or_none,
    _parse_networks,
    _network_hint,
)
_REFUSALS = ", ".join(NAMED)
_REFUSAL = _Kind(
    f"{_REFUSALS}, 'say TEXT', an IRefusal or a protocol factory",
    f"{_REFUSALS}, or 'say TEXT'",
    refusal_of,
    str,
    _refusal_hint,
)
_NOTICE = _Kind(
    "seconds above 0 and what is said then, such as (5, b'please wait'), or None",
    "a time above 0 and what is said then, such as '5s please wait', or none",
    _notice,
    _parse_notice,
)
_NAME = _Kind("a text of at least one character", "a text of at least one character", _name, str)


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
        None, _COUNT_ABOVE_ZERO, "connections", "how many connections of one peer are served at once"
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
        _COUNT_ABOVE_ZERO,
        "connections",
        "how many of these may begin at once; if not given, as many as in a second, at least 1",
    )
    max_waiting: int | None = _setting(
        None,
        _COUNT,
        "connections",
        "how many connections may wait in the line; if not given, as many as the descriptors allow",
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
    departed_on_half_close: bool | str = _setting(
        "auto",
        _AUTO,
        "",
        "whether a waiting client that closes its direction, having sent data, has departed; auto: yes where"
        " the protocol is of a kind that answers, such as HTTP",
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
    log: bool = _setting(True, _FLAG, "", "log when it is full, by which limit, and when it has room again")
    name: str = _setting("default", _NAME, "text", "what the limiter is called in logs and metrics")

    def evolve(self, changes: Mapping[str, Any], spell: Callable[[str], str] = str) -> Settings:
        """
        These settings with some of them changed.

        :param spell: how the user spells a setting's name.
        :raises TypeError: for an unknown setting or a value of a wrong type.
        :raises ValueError: for a wrong value, or one that needs another setting.
        """
        new = attrs.evolve(self, **{name: _converted(name, value) for name, value in changes.items()})
        # One that is left when the rate is lifted does no harm.
        if changes.get("max_burst") is not None and new.max_rate is None:
            raise ValueError(f"{spell('max_burst')} needs {spell('max_rate')}, how many begin in a second")
        return new


FIELDS: Mapping[str, attrs.Attribute[Any]] = attrs.fields_dict(Settings)


#: The settings that limit. In code a limiter without any only counts; wherever else, that is a slip.
LIMITS = ("max_connections", "max_per_peer", "max_rate")


def check_limits(given: Container[str], spell: Callable[[str], str], none: str) -> None:
    """
    See to it that something would be limited.

    :param given: the names of what was given, ``shared`` among them.
    :param spell: how the user spells a name.
    :param none: how the user says that nothing is to be limited.
    :raises ValueError: if nothing is, and that was not said.
    """
    names = (*LIMITS, "shared")
    if not any(name in given for name in names):
        raise ValueError(
            f"nothing would be limited: give {either([spell(name) for name in names])}, "
            f"or {none} if everybody is to be served and only counted"
        )


def values(field: attrs.Attribute[Any]) -> str:
    """
    Which texts a setting can have, and which is meant if there is none, for a help text.
    """
    what = field.metadata["unit"] or field.metadata["kind"].in_text
    default = "yes" if field.default is True else "no" if field.default is False else shown(field.default)
    return f"[{what}]" if field.default is None else f"[{what}; default: {default}]".replace("'", "")


def _converted(name: str, value: Any) -> Any:
    if name not in FIELDS:
        hint = did_you_mean(name, FIELDS) or f"there are {', '.join(FIELDS)}"
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
            raise ValueError(kind.wrong_text(spell(name), text)) from None
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
        elif name == "notice" and isinstance(value, list):
            after, what = value
            given = seconds(after) if isinstance(after, str) else after, unescaped(what)
        return kind.convert(given)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(kind.wrong_text(name, value)) from None


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
