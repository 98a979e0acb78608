"""
The one table of a limiter's settings, from which code, command line and endpoint string take theirs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

C = TypeVar("C", bound=type)


@attrs.frozen
class _Kind:
    """
    What values a setting may have, in code and as text.

    :ivar right: the values that would be right, as the end of a sentence.
    :ivar types: the types a value may have in code.
    :ivar fits: whether a value of such a type is right.
    :ivar parse: makes a value of a text, or raises ValueError.
    """

    right: str
    types: tuple[type, ...]
    fits: Callable[[Any], bool]
    parse: Callable[[str], Any]

    def check(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """
        Be the validator of an attrs field.
        """
        if isinstance(value, bool) or not isinstance(value, self.types):
            raise TypeError(self.wrong(attribute.name, value))
        if not self.fits(value):
            raise ValueError(self.wrong(attribute.name, value))

    def wrong(self, name: str, value: object) -> str:
        """
        The sentence that tells of a wrong value.
        """
        return f"{name} must be {self.right}, not {value!r}"


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else parse(text)


_COUNT = _Kind(
    "a whole number, 0 or more, or None for no limit",
    (int, type(None)),
    lambda value: value is None or value >= 0,
    _or_none(int),
)
_SECONDS = _Kind(
    "a number of seconds above 0, or None for no limit",
    (int, float, type(None)),
    lambda value: value is None or 0 < value < math.inf,
    _or_none(float),
)
_NAME = _Kind("a text of at least one character", (str,), bool, str)


def _setting(default: Any, kind: _Kind, unit: str, help: str) -> Any:
    return attrs.field(
        default=default, validator=kind.check, metadata={"kind": kind, "unit": unit, "help": help}
    )


@attrs.frozen(kw_only=True)
class Settings:
    """
    Everything that can be set about a limiter, and changed while it runs.
    """

    max_connections: int | None = _setting(
        None, _COUNT, "connections", "how many connections are served at once"
    )
    max_waiting: int | None = _setting(
        None,
        _COUNT,
        "connections",
        "how many connections may wait in the line; None: as many as the descriptors allow",
    )
    wait_timeout: float | None = _setting(
        None, _SECONDS, "seconds", "how long a connection may wait before it is refused"
    )
    name: str = _setting("default", _NAME, "", "what the limiter is called in logs and metrics")

    def evolve(self, changes: Mapping[str, Any]) -> Settings:
        """
        These settings with some of them changed.

        :raises TypeError: for an unknown setting or a value of a wrong type.
        :raises ValueError: for a wrong value.
        """
        for name in changes:
            if name not in FIELDS:
                nearest = difflib.get_close_matches(name, FIELDS, 1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(FIELDS)}"
                raise TypeError(f"{name} is not a setting; {hint}")
        return attrs.evolve(self, **changes)


FIELDS: Mapping[str, attrs.Attribute[Any]] = attrs.fields_dict(Settings)


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
            value = kind.parse(text)
            fits = kind.fits(value)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(kind.wrong(spell(name), text))
        values[name] = value
    return values


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
