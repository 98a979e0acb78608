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


#: What settings are about, in the order of the help text.
LIMITS_GROUP, QUEUE, REFUSING, SEEING = "Limits", "Queue", "Refusing", "Seeing"


def _setting(default: Any, kind: Kind, unit: str, group: str, help: str) -> Any:
    return attrs.field(default=default, metadata={"kind": kind, "unit": unit, "group": group, "help": help})


@attrs.frozen(kw_only=True)
class Settings:
    """
    Everything that can be set about a limiter, and changed while it runs.
    """

    max_connections: int | None = _setting(
        None, kinds.COUNT.or_none(), "connections", LIMITS_GROUP, "how many connections are served at once"
    )
    max_per_peer: int | None = _setting(
        None,
        kinds.COUNT_ABOVE_ZERO.or_none(),
        "connections",
        LIMITS_GROUP,
        "how many connections of one peer are served at once",
    )
    peer_prefix: tuple[int, int] = _setting(
        (32, 64),
        kinds.PREFIX,
        "bits, bits",
        LIMITS_GROUP,
        "how many bits of an IPv4 and of an IPv6 address make a peer",
    )
    over_peer: str = _setting(
        "wait",
        kinds.one_of("wait", "refuse"),
        "",
        LIMITS_GROUP,
        "what happens to a connection whose peer is at its cap: it waits, or is refused",
    )
    max_rate: float | None = _setting(
        None,
        kinds.RATE.or_none(),
        "per second",
        LIMITS_GROUP,
        "how many connections begin to be served in a second",
    )
    max_burst: int | None = _setting(
        None,
        kinds.COUNT_ABOVE_ZERO.or_none(),
        "connections",
        LIMITS_GROUP,
        "how many of these may begin at once; none: as many as in a second, at least 1",
    )
    max_waiting: int | None = _setting(
        None,
        kinds.COUNT.or_none(),
        "connections",
        QUEUE,
        "how many connections may wait in the queue; none: as many as the file descriptors allow",
    )
    wait_timeout: float | None = _setting(
        None,
        kinds.SECONDS.or_none(),
        "seconds",
        QUEUE,
        "how long a connection may wait before it is refused",
    )
    order: Any = _setting(
        "fifo",
        kinds.ORDER,
        "",
        QUEUE,
        "whose turn it is: first come, first served (fifo); the newest first (lifo); the peers in turn"
        " (fair); first come, first served until the queue is overloaded, then the newest first (adaptive)",
    )
    adaptive_target: float = _setting(
        0.5,
        kinds.SECONDS,
        "seconds",
        QUEUE,
        "with order adaptive: the queue is overloaded when waits are longer than this ...",
    )
    adaptive_interval: float = _setting(
        10.0, kinds.SECONDS, "seconds", QUEUE, "with order adaptive: ... for this time without a break"
    )
    departed_on_half_close: bool | str = _setting(
        "auto",
        kinds.AUTO,
        "",
        QUEUE,
        "whether a waiting client that has sent data and then closed its direction has departed; auto: yes"
        " where the protocol is of a kind that answers, such as HTTP",
    )
    notice: tuple[float, Any] | None = _setting(
        None,
        kinds.NOTICE,
        "seconds, text",
        QUEUE,
        "what a waiting client is told, once, and after which time, such as '5s please wait'",
    )
    idle_timeout: float | None = _setting(
        None,
        kinds.SECONDS.or_none(),
        "seconds",
        LIMITS_GROUP,
        "while somebody waits, close served connections that moved no byte for this time, the longest idle"
        " first (Linux, TCP)",
    )
    exempt: Any = _setting(
        None,
        kinds.NETWORKS,
        "networks",
        LIMITS_GROUP,
        "networks whose clients are served at once and take no slot",
    )
    refusal: Any = _setting(
        close,
        kinds.REFUSAL,
        "",
        REFUSING,
        "what a refused client gets: a closed connection, a reset, a text, or the words of a protocol",
    )
    dry_run: bool = _setting(
        False,
        kinds.FLAG,
        "",
        SEEING,
        "serve everybody, and report who would have waited or been refused",
    )
    log: bool = _setting(
        True,
        kinds.FLAG,
        "",
        SEEING,
        "log when the limiter is full, and by which limit, and when it has room again",
    )
    name: str = _setting(
        "default", kinds.NAME, "text", SEEING, "what the limiter is called in logs and metrics"
    )

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


def values(field: attrs.Attribute[Any]) -> tuple[str, str]:
    """
    Which texts a setting can have, and which of them is its default, for a help text.
    """
    kind: Kind = field.metadata["kind"]
    texts = field.metadata["unit"] or (either(kind.choices) if len(kind.choices) < 6 else kind.in_text)
    default = field.default
    if isinstance(default, bool):
        return texts, "yes" if default else "no"
    return texts.replace("'", ""), f"{default:g}" if isinstance(default, float) else shown(default).strip("'")


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
