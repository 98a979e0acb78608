"""
The configuration file: what it may say, and everything that is wrong with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from connlimit._limiter.settings import FIELDS, Settings, check_limits, load
from connlimit._limiter.values import FLAG, Kind, one_of, shown, text, texts
from connlimit._listening.endpoint import PER
from connlimit._listening.ports import WHEN_FULL
from connlimit._twistd.config import (
    DRAIN_TIMEOUT,
    PROCESSES,
    WORKER_TIMEOUT,
    WORKER_TIMEOUTS,
    Config,
    LimiterConfig,
    ServiceConfig,
    StatusConfig,
)
from connlimit._twistd.targets.relay_options import RELAY_FIELDS, RelayOptions, relay_options
from connlimit._twistd.toml import ConfigError, document

_URL = text("the URL of a Redis, such as 'redis://localhost'")
_LISTEN = texts("an endpoint such as 'tcp:8080', or several")
_PLUGIN = texts("a twistd plugin's name and arguments, such as ['web', '--path=.']")
_FORWARD = text("an endpoint such as 'tcp:localhost:9000'")
_FACTORY = text("a text such as 'mypackage.server:factory'")
_TAC = text("the path of a .tac file")
_SKIP = texts("an endpoint such as 'tcp:8081', or several")
_STATUS_LISTEN = text("an endpoint such as 'tcp:8081:interface=127.0.0.1'")
_HOSTS = texts("a host name, or several")


def read(path: Path, text: str | None = None) -> Config:
    """
    Read a file.

    :param text: its text, if it was read already.
    :raises ConfigError: with everything that is wrong with it.
    """
    return _Reader(str(path)).config(document(path, text))


class _Reader:
    """
    Makes a `Config` of a document, and collects what is wrong.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._errors: list[str] = []

    def config(self, document: Mapping[str, Any]) -> Config:
        """
        The document's `Config`.
        """
        known = self._known(
            document,
            "",
            [
                "limiters",
                "services",
                "status",
                "drain_timeout",
                "log_connections",
                "processes",
                "worker_timeout",
            ],
        )
        tables = self._tables(known, "limiters")
        limiters = {name: self._limiter(name, table) for name, table in tables.items()}
        if not limiters and not self._errors:
            self._wrong("", "limiters", "at least one table, such as [limiters.web]", None)
        services = {
            name: self._service(name, table, limiters)
            for name, table in self._tables(known, "services").items()
        }
        if not services and not self._errors:
            self._wrong("", "services", "at least one table, such as [services.web]", None)
        status = self._status(known["status"]) if "status" in known else None
        drain = self._value("", known, "drain_timeout", DRAIN_TIMEOUT, 0.0)
        log = self._value("", known, "log_connections", FLAG, False)
        processes = self._value("", known, "processes", PROCESSES, 1)
        timeout = self._value("", known, "worker_timeout", WORKER_TIMEOUTS, WORKER_TIMEOUT)
        if self._errors:
            raise ConfigError([_one_line(each) for each in self._errors])
        return Config(
            limiters,
            {k: v for k, v in services.items() if v is not None},
            status,
            drain,
            log,
            processes,
            timeout,
        )

    def _limiter(self, name: str, table: Mapping[str, Any]) -> LimiterConfig:
        where = f"limiters.{name}"
        before = len(self._errors)
        given = {}
        keys = [*(each for each in FIELDS if each != "name"), "shared"]
        for key, value in self._known(table, where, keys).items():
            if key == "shared":
                continue
            try:
                given[key] = load(key, value)
            except ValueError as error:
                self._errors.append(f"{self._file}: [{where}] {error}")
        settings = Settings()
        if len(self._errors) == before:
            try:
                settings = settings.evolve({**given, "name": name})
                check_limits(table, str, 'max_connections = "none"')
            except ValueError as error:
                self._errors.append(f"{self._file}: [{where}] {error}")
        return LimiterConfig(settings, self._value(where, table, "shared", _URL, None))

    def _service(
        self, name: str, table: Mapping[str, Any], limiters: Mapping[str, object]
    ) -> ServiceConfig | None:
        where = f"services.{name}"
        before = len(self._errors)
        keys = [each.name for each in attrs.fields(ServiceConfig) if each.name not in ("name", "relay")]
        table = self._known(table, where, [*keys, *RELAY_FIELDS])
        listen = self._value(where, table, "listen", _LISTEN, ())
        plugin = self._value(where, table, "plugin", _PLUGIN, ())
        forward = self._value(where, table, "forward", _FORWARD, None)
        relay = self._relay(where, table, forward)
        factory = self._value(where, table, "factory", _FACTORY, None)
        when_full = self._value(where, table, "when_full", WHEN_FULL, "refuse")
        per = self._value(where, table, "per", PER, "connection")
        only = next(iter(limiters)) if len(limiters) == 1 else None
        names = ", ".join(limiters) or "none yet"
        one = attrs.evolve(one_of(*limiters), in_text=f"the name of a limiter ({names})")
        limiter = self._value(where, table, "limiter", one, only)
        if limiter is None and "limiter" not in table:
            self._wrong(where, "limiter", f"the name of a limiter ({names})", None)
        tac = self._value(where, table, "tac", _TAC, None)
        skip = self._value(where, table, "skip", _SKIP, ())
        given = [key for key in ("forward", "factory", "plugin", "tac") if key in table]
        if len(given) != 1:
            self._errors.append(
                f"{self._file}: [{where}] needs one of forward, factory, plugin and tac, "
                f"not {' and '.join(given) or 'none'}"
            )
        elif bool(listen) == bool(plugin or tac) and len(self._errors) == before:
            what = f"must be left out with {given[0]}, which listens by itself" if listen else "is missing"
            self._errors.append(f"{self._file}: [{where}] listen {what}")
        elif skip and not (plugin or tac):
            self._errors.append(f"{self._file}: [{where}] skip must be left out without plugin or tac")
        if len(self._errors) > before:
            return None
        return ServiceConfig(
            name, limiter, listen, forward, factory, plugin, when_full, relay, tac, skip, per
        )

    def _relay(self, where: str, table: Mapping[str, Any], forward: str | None) -> RelayOptions:
        given = {name: table[name] for name in RELAY_FIELDS if name in table}
        if given and "forward" not in table:
            self._errors.append(f"{self._file}: [{where}] {next(iter(given))} needs forward")
        elif given and forward is not None:
            try:
                return relay_options(given, forward)
            except ValueError as error:
                self._errors.append(f"{self._file}: [{where}] {error}")
        return RelayOptions()

    def _status(self, table: Any) -> StatusConfig | None:
        if not isinstance(table, dict):
            self._wrong("", "status", "a table", table)
            return None
        table = self._known(table, "status", [each.name for each in attrs.fields(StatusConfig)])
        listen = self._value("status", table, "listen", _STATUS_LISTEN, None)
        if "listen" not in table:
            self._wrong("status", "listen", _STATUS_LISTEN.in_text, None)
        show = self._value("status", table, "show_peers", FLAG, False)
        hosts = self._value("status", table, "hosts", _HOSTS, ())
        return StatusConfig(listen, show, hosts)

    def _tables(self, document: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
        tables = document.get(key, {})
        if not isinstance(tables, dict):
            self._wrong("", key, "tables", tables)
            return {}
        found: dict[str, Mapping[str, Any]] = {}
        for name, table in tables.items():
            if isinstance(table, dict) and name:
                found[name] = table
            else:
                self._wrong(key, name, "a table with a name", table)
        return found

    def _known(self, table: Mapping[str, Any], where: str, keys: list[str]) -> dict[str, Any]:
        for key in table:
            if key not in keys:
                nearest = difflib.get_close_matches(key, keys, 1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(keys)}"
                self._errors.append(f"{self._file}: {_place(where)}{key} is not known; {hint}")
        return {key: value for key, value in table.items() if key in keys}

    def _value(
        self,
        where: str,
        table: Mapping[str, Any],
        key: str,
        kind: Kind,
        default: Any,
    ) -> Any:
        if key not in table:
            return default
        try:
            return kind.of_file(key, table[key])
        except ValueError as error:
            self._errors.append(f"{self._file}: {_place(where)}{error}")
            return default

    def _wrong(self, where: str, key: str, right: str, value: object) -> None:
        was = "and is missing" if value is None else f"not {shown(value)}"
        self._errors.append(f"{self._file}: {_place(where)}{key} must be {right}, {was}")


def _one_line(text: str) -> str:
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _place(where: str) -> str:
    return f"[{where}] " if where else ""
