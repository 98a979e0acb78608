"""
The one table of a limiter's settings, from which code, command line and endpoint string take theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Generic, Literal, TypedDict, TypeVar, overload

import attrs

from connlimit._limiter import values as kinds
from connlimit._limiter.values import Kind, did_you_mean, either, shown
from connlimit.refusals import close

T = TypeVar("T")


def _setting(default: Any, kind: Kind, unit: str, help: str) -> Any:
    return attrs.field(default=default, metadata={"kind": kind, "unit": unit, "help": help})


@attrs.frozen(kw_only=True)
class Settings:
    """
    Everything that can be set about a limiter, and changed while it runs.
    """

    max_connections: int | None = _setting(
        None, kinds.COUNT.or_none(), "connections", "how many connections are served at once"
    )
    max_per_peer: int | None = _setting(
        None,
        kinds.COUNT_ABOVE_ZERO.or_none(),
        "connections",
        "how many connections of one peer are served at once",
    )
    peer_prefix: tuple[int, int] = _setting(
        (32, 64), kinds.PREFIX, "bits, bits", "how much of an IPv4 and of an IPv6 address makes a peer"
    )
    over_peer: str = _setting(
        "wait",
        kinds.one_of("wait", "refuse"),
        "",
        "what becomes of a connection whose peer is at its cap: it waits, or is refused",
    )
    max_rate: float | None = _setting(
        None, kinds.RATE.or_none(), "per second", "how many connections begin to be served in a second"
    )
    max_burst: int | None = _setting(
        None,
        kinds.COUNT_ABOVE_ZERO.or_none(),
        "connections",
        "how many of these may begin at once; if not given, as many as in a second, at least 1",
    )
    max_waiting: int | None = _setting(
        None,
        kinds.COUNT.or_none(),
        "connections",
        "how many connections may wait in the line; if not given, as many as the descriptors allow",
    )
    wait_timeout: float | None = _setting(
        None, kinds.SECONDS.or_none(), "seconds", "how long a connection may wait before it is refused"
    )
    order: Any = _setting("fifo", kinds.ORDER, "", "whose turn it is: the order of the line")
    adaptive_target: float = _setting(
        0.5, kinds.SECONDS, "seconds", "order adaptive: the wait above which the line is too long"
    )
    adaptive_interval: float = _setting(
        10.0,
        kinds.SECONDS,
        "seconds",
        "order adaptive: for how long it may be too long before that is overload",
    )
    departed_on_half_close: bool | str = _setting(
        "auto",
        kinds.AUTO,
        "",
        "whether a waiting client that closes its direction, having sent data, has departed; auto: yes where"
        " the protocol is of a kind that answers, such as HTTP",
    )
    notice: tuple[float, Any] | None = _setting(
        None, kinds.NOTICE, "seconds, text", "what a waiting client is told once, after so many seconds"
    )
    idle_timeout: float | None = _setting(
        None,
        kinds.SECONDS.or_none(),
        "seconds",
        "while somebody waits, close a served connection that moved no byte for so long (Linux)",
    )
    exempt: Any = _setting(
        None, kinds.NETWORKS, "networks", "peers that are always served at once and take no slot"
    )
    refusal: Any = _setting(close, kinds.REFUSAL, "", "what a refused client gets")
    dry_run: bool = _setting(
        False, kinds.FLAG, "", "serve everybody, and report who would have waited or been refused"
    )
    log: bool = _setting(
        True, kinds.FLAG, "", "log when it is full, by which limit, and when it has room again"
    )
    name: str = _setting("default", kinds.NAME, "text", "what the limiter is called in logs and metrics")

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

    def changed(self) -> dict[str, Any]:
        """
        Those that are not as they are unless something else is said.
        """
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in values.items() if value != FIELDS[name].default}


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
    return kind_of(name).of_code(name, value)


def kind_of(name: str) -> Kind:
    """
    What values a setting can have.
    """
    kind: Kind = FIELDS[name].metadata["kind"]
    return kind


def parse(texts: Mapping[str, str], spell: Callable[[str], str] = str) -> dict[str, Any]:
    """
    The values of settings that were given as text.

    :param texts: the text given for each setting, by its name in `Settings`.
    :param spell: how the user spells a setting's name.
    :raises ValueError: for a wrong value, naming the setting as the user spells it.
    """
    return {name: kind_of(name).of_text(spell(name), text) for name, text in texts.items()}


def load(name: str, value: Any) -> Any:
    """
    The value of a setting that a configuration file gives, as text or otherwise.

    :raises ValueError: for a wrong value.
    """
    return kind_of(name).of_file(name, value)


class SettingsDict(TypedDict, total=False):
    """
    Settings by their names, as they are given in code.
    """

    max_connections: int | None
    max_per_peer: int | None
    peer_prefix: Sequence[int]
    over_peer: OverPeer
    max_rate: float | None
    max_burst: int | None
    max_waiting: int | None
    wait_timeout: float | None
    order: Order
    adaptive_target: float
    adaptive_interval: float
    departed_on_half_close: Auto
    notice: Notice
    idle_timeout: float | None
    exempt: Exempt
    refusal: Any
    dry_run: bool
    log: bool
    name: str


OverPeer = Literal["wait", "refuse"]
Order = Literal["fifo", "lifo", "fair", "adaptive"] | Callable[["Settings", Callable[[Any], Hashable]], Any]
Auto = bool | Literal["auto"]
Notice = tuple[float, bytes | Callable[[Any], bytes]] | None
Exempt = Iterable[str | IPv4Network | IPv6Network] | Callable[[Any], bool] | None


class _Unconverted:
    """
    No value is of this type: it only says that what is read need not be what was set, as it was converted.
    """


class Setting(Generic[T]):
    """
    The attribute of a setting, of whatever has ``settings`` and ``reconfigure``.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        metadata = FIELDS[name].metadata
        unit = f" ({metadata['unit']})" if metadata["unit"] else ""
        self.__doc__ = f"{metadata['help'][0].upper()}{metadata['help'][1:]}{unit}."

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.settings, self._name)

    def __set__(self, instance: Any, value: T | _Unconverted) -> None:
        instance.reconfigure(**{self._name: value})
