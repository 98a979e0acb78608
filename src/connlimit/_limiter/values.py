"""
The kinds of values: what is right of each, in code, as text and in a file, and the sentence on what is wrong.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time
from ipaddress import ip_network
from typing import Any

import attrs

from connlimit._limiter.peers import exempt_or_none, prefix_lengths
from connlimit._limiter.queue import ORDERS
from connlimit._system.durations import is_seconds, seconds
from connlimit.refusals import NAMED, refusal_of, unescaped


@attrs.frozen
class Kind:
    """
    What values there are of one kind, in code and as text.

    :ivar in_code: the values that would be right in code, as the end of a sentence.
    :ivar in_text: the texts that would be right, likewise.
    :ivar convert: makes the value of one that is given in code;
        TypeError or ValueError if that is impossible.
    :ivar parse: makes a value for *convert* of a text; ValueError or KeyError if that is impossible.
    :ivar hint: what may have been meant by a value that is wrong, as a question, or nothing.
    :ivar choices: all texts that are right, if they are few.
    """

    in_code: str
    in_text: str
    convert: Callable[[Any], Any]
    parse: Callable[[str], Any]
    hint: Callable[[Any], str] = lambda value: ""
    choices: tuple[str, ...] = ()

    def of_code(self, name: str, value: object) -> Any:
        """
        The value that is given in code.

        :param name: what it is the value of.
        :raises TypeError: for one of a wrong type.
        :raises ValueError: for a wrong one.
        """
        try:
            return self.convert(value)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{name} must be {self.in_code}, not {value!r}{self._question(value)}"
            ) from None

    def of_text(self, name: str, text: str) -> Any:
        """
        The value that is given as a text.

        :param name: what it is the value of, as the user spells it.
        :raises ValueError: for a wrong one.
        """
        try:
            return self.convert(self.parse(text))
        except (KeyError, TypeError, ValueError):
            raise ValueError(self.wrong_text(name, text)) from None

    def of_file(self, name: str, value: object) -> Any:
        """
        The value that a configuration file gives, as a text or otherwise.

        :raises ValueError: for a wrong one.
        """
        try:
            return self.convert(self.parse(value) if isinstance(value, str) else value)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(self.wrong_text(name, value)) from None

    def wrong_text(self, name: str, value: object) -> str:
        """
        The sentence on a wrong text, or on a wrong value in a file.
        """
        return f"{name} must be {self.in_text}, not {shown(value)}{self._question(value)}"

    def or_none(self, means: str = " for no limit") -> Kind:
        """
        This kind, or None.

        :param means: what None is for.
        """

        def convert(value: Any) -> Any:
            return None if value is None else self.convert(value)

        def parse(text: str) -> Any:
            return None if text.lower() == "none" else self.parse(text)

        return Kind(f"{self.in_code}, or None{means}", f"{self.in_text}, or none{means}", convert, parse)

    def _question(self, value: object) -> str:
        hint = self.hint(value)
        return f"; {hint}" if hint else ""


# Words


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
    *others, last = choices or ["nothing"]
    return f"{', '.join(others)} or {last}" if others else last


# Numbers and durations


def _number(types: type | tuple[type, ...], fits: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """
    How a number is checked.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, types):
            raise TypeError
        if not fits(value):
            raise ValueError
        return value

    return convert


def whole_number(minimum: int, maximum: int | None = None) -> Kind:
    """
    Whole numbers.
    """
    right = (
        f"a whole number, {minimum} or more"
        if maximum is None
        else f"a whole number from {minimum} to {maximum}"
    )
    convert = _number(int, lambda value: value >= minimum and (maximum is None or value <= maximum))
    return Kind(right, right, convert, int)


def _above_zero(value: object) -> bool:
    return is_seconds(value) and value != 0


def duration(minimum: float = 0.0, maximum: float = math.inf) -> Kind:
    """
    Durations: seconds in code, and texts such as ``30``, ``500ms``, ``5min`` or ``2h 30min``.
    """
    such_as = "such as 30, 500ms, 30s or 5min"
    convert = _number((int, float), lambda value: is_seconds(value, minimum) and value <= maximum)
    if maximum < math.inf:
        in_code, in_text = (
            f"a number of seconds from {minimum:g} to {maximum:g}",
            f"a time from {minimum:g} to {maximum:g} seconds, {such_as}",
        )
    else:
        unit = "" if not minimum else " second" if minimum == 1 else " seconds"
        in_code, in_text = (
            f"a number of seconds, {minimum:g} or more",
            f"a time of {minimum:g}{unit} or more, {such_as}",
        )
    return Kind(in_code, in_text, convert, seconds)


COUNT = whole_number(0)
COUNT_ABOVE_ZERO = whole_number(1)
SECONDS = Kind(
    "a number of seconds above 0",
    "a time above 0, such as 30, 500ms, 30s or 5min",
    _number((int, float), _above_zero),
    seconds,
)
RATE = Kind("a number above 0", "a number above 0", _number((int, float), _above_zero), float)


# Choices


def one_of(*choices: str) -> Kind:
    """
    One of some words.
    """

    def convert(value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError
        if value not in choices:
            raise ValueError
        return value

    right = either(choices)
    return Kind(right, right, convert, str, lambda value: did_you_mean(value, choices), choices)


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


FLAG = Kind("True or False", "yes or no, true or false", _flag, _parse_flag, choices=("yes", "no"))
AUTO = Kind("'auto', True or False", "auto, yes or no", _auto, _parse_auto, choices=("auto", "yes", "no"))


# Texts


def text(right: str = "a text of at least one character") -> Kind:
    """
    Texts that are not empty.

    :param right: what would be right, as the end of a sentence.
    """
    return Kind(right, right, _text, str)


def texts(right: str) -> Kind:
    """
    One such text or several.
    """

    def convert(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if not value:
            raise ValueError
        return tuple(map(_text, value))

    return Kind(right, right, convert, lambda text: [text])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value:
        raise ValueError
    return value


NAME = text()


# What only some settings of a limiter have


def _order(value: Any) -> Any:
    if isinstance(value, str) and value not in ORDERS:
        raise ValueError
    if not isinstance(value, str) and not callable(value):
        raise TypeError
    return value


def _notice(value: Any) -> Any:
    """
    :param value: the seconds and what is said, in code or as a file has them.
    """
    if value is None:
        return None
    after, what = value
    if isinstance(value, list) and isinstance(what, str):
        after, what = seconds(after) if isinstance(after, str) else after, unescaped(what)
    if not _above_zero(after):
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


_NAMED_ORDER = one_of(*ORDERS)
ORDER = attrs.evolve(
    _NAMED_ORDER, in_code=f"{_NAMED_ORDER.in_code}, or a callable that makes an order", convert=_order
)
PREFIX = Kind(
    "the prefix lengths of IPv4, 0 to 32, and IPv6, 0 to 128, such as (32, 64)",
    "the prefix lengths of IPv4, 0 to 32, and IPv6, 0 to 128, such as 32,64",
    prefix_lengths,
    lambda text: tuple(int(part) for part in text.split(",")),
)
NETWORKS = Kind(
    "IP networks, such as ['127.0.0.0/8', '::1'], or a callable that is given an address",
    "IP networks, such as 127.0.0.0/8,::1, or none",
    exempt_or_none,
    _parse_networks,
    _network_hint,
)
_REFUSALS = ", ".join(NAMED)
REFUSAL = Kind(
    f"{_REFUSALS}, 'say TEXT', an IRefusal or a protocol factory",
    f"{_REFUSALS}, or 'say TEXT'",
    refusal_of,
    str,
    lambda value: did_you_mean(value, [*NAMED, "say TEXT"]),
    tuple(NAMED),
)
NOTICE = Kind(
    "seconds above 0 and what is said then, such as (5, b'please wait'), or None",
    "a time above 0 and what is said then, such as '5s please wait', or none",
    _notice,
    _parse_notice,
)
