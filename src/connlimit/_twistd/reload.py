"""
A program that is described by a configuration file, and changes with it while it runs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from twisted.application.service import IProcess, IService
from twisted.internet.defer import Deferred, DeferredLock, ensureDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python import usage

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import FIELDS, Settings
from connlimit._listening.checked_endpoints import client_endpoint, server_endpoint, status_endpoint
from connlimit._listening.service import limit_service, to_limit
from connlimit._system import systemd
from connlimit._twistd.config_file import Config, ServiceConfig, StatusConfig, read
from connlimit._twistd.processes.inherited_ports import NotOpened
from connlimit._twistd.processes.role import Alone
from connlimit._twistd.program import Program
from connlimit._twistd.services import Parts, PluginUnit, ServiceUnit, Unit, started, stopped
from connlimit._twistd.targets.by_name import import_factory, load_application, made_plugin, plugin_options
from connlimit._twistd.targets.relay import RelayFactory
from connlimit._twistd.toml import ConfigError, source
from connlimit.shared.by_url import close, follow, shared_limits
from connlimit.status import status_service

#: Seconds between two attempts to open what could not be opened.
_RETRY_INTERVAL = 1.0


def check(
    path: Path,
    config: Config,
    reactor: Any,
    twistd: usage.Options | None = None,
    running: Mapping[str, ServiceConfig] | None = None,
) -> dict[str, Parts]:
    """
    Find everything that the services name, and make what they are made of.

    :param twistd: the options of twistd itself, for plugins that look at them.
    :param running: the services that run already; plugins that need not be started again are not made.
    :raises ConfigError: with all that cannot be found.
    """
    parts, errors = {}, []
    for name, service in config.services.items():
        is_running = running is not None and running.get(name) == service
        try:
            parts[name] = _parts(service, reactor, twistd, is_running)
        except ConfigError as error:
            errors += [f"{path}: [services.{name}] {each}" for each in error.errors]
    if config.status is not None:
        try:
            status_endpoint(reactor, config.status.listen, "listen")
        except ValueError as error:
            errors.append(f"{path}: [status] {error}")
    for name, url in config.shared.items():
        try:
            shared_limits(url, Settings().evolve(config.limiters[name]))
        except ValueError as error:
            errors.append(f"{path}: [limiters.{name}] {error}")
    if errors:
        raise ConfigError(errors)
    return parts


def _parts(service: ServiceConfig, reactor: Any, twistd: usage.Options | None, is_running: bool) -> Parts:
    errors: list[str] = []

    def found(find: Any, *arguments: Any) -> Any:
        try:
            return find(*arguments)
        except ValueError as error:
            errors.append(str(error))

    endpoints = {each: found(server_endpoint, reactor, each, "listen") for each in service.listen}
    factory: Any = None
    make = None
    if service.forward is not None:
        backend = found(client_endpoint, reactor, service.forward, "forward")
        factory = RelayFactory(backend, service.forward, service.relay)
    elif service.factory is not None:
        factory = found(import_factory, service.factory, "factory")
    else:
        options = None
        if service.plugin:
            options = found(plugin_options, service.plugin[0], list(service.plugin[1:]), twistd)
        make = partial(_limited, service, options, twistd, None)
        if not errors and not is_running:
            make = partial(_limited, service, options, twistd, found(_made, service, options, twistd))
    if errors:
        raise ConfigError(errors)
    return Parts(service, endpoints, factory, make)


def _made(service: ServiceConfig, options: usage.Options | None, twistd: usage.Options | None) -> IService:
    """
    The service of a plugin or of an application, which can be limited.

    :raises ValueError: if it cannot be made, or cannot be limited.
    """
    if service.tac is None:
        assert options is not None
        return made_plugin(service.plugin[0], options, service.when_full, service.skip)
    application = load_application(service.tac, "tac")
    to_limit(application, service.when_full, service.skip, service.tac)
    process = IProcess(application, None)
    for name in ("uid", "gid"):
        wanted = getattr(process, name, None)
        if wanted is not None and twistd is not None and twistd.get(name, wanted) is None:
            raise ValueError(
                f"tac {service.tac} wants the {name} {wanted}: run twistd with --{name} {wanted}"
            )
    return IService(application)


def _limited(
    service: ServiceConfig,
    options: usage.Options | None,
    twistd: usage.Options | None,
    made: IService | None,
    limiter: Limiter,
) -> IService:
    if made is None:
        made = _made(service, options, twistd)
    limit_service(made, limiter, service.when_full, service.skip)
    return made


class _Page:
    """
    The status page of a program, or none.
    """

    name = "the status page"

    def __init__(self, program: ConfiguredProgram, config: StatusConfig | None) -> None:
        self._program = program
        self._config = config if program.role.shows else None
        self._service: IService | None = None

    def wanted(self) -> list[str]:
        """
        See `Unit.wanted`.
        """
        return [] if self._config is None else [self._config.listen]

    def opened(self) -> list[str]:
        """
        See `Unit.opened`.
        """
        return [] if self._service is None else self.wanted()

    def make(self) -> None:
        """
        Make what shows the page, to be started by the program.
        """
        program, config = self._program, self._config
        if config is not None:
            endpoint = status_endpoint(program.reactor, config.listen)
            watched = program.role.watched(program)
            self._service = status_service(endpoint, watched, config.show_peers, config.hosts)
            program.status = self._service

    def open(self, piece: str) -> None:
        """
        See `Unit.open`.
        """
        before = self._program.status
        self.make()
        assert self._service is not None
        try:
            started(self._service)
        except Exception:
            self._service, self._program.status = None, before
            raise

    async def close(self, piece: str) -> None:
        """
        See `Unit.close`.
        """
        service, self._service = self._service, None
        assert service is not None
        if self._program.status is service:
            self._program.status = None
        await stopped(self.name, service.stopService)

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        See `Unit.may_be_at`: there is no telling.
        """
        return True


class ConfiguredProgram(Program):
    """
    Runs what a file says; SIGHUP reads it again.

    A service that cannot listen where a file that is read again says changes nothing. What else cannot be
    opened, a status page or what was open before, is tried again every second.
    """

    _log = Logger(namespace="connlimit.reload")

    def __init__(
        self,
        path: Path,
        config: Config,
        parts: dict[str, Parts],
        reactor: Any,
        role: Alone | None = None,
        text: str = "",
        twistd: usage.Options | None = None,
    ) -> None:
        """
        :param parts: what `check` found for the configuration.
        :param text: the text of the file.
        :param twistd: the options of twistd itself.
        """
        super().__init__(config.drain_timeout, config.log_connections, role)
        self.reactor = reactor
        self._path = path.absolute()
        self._text = text
        self._config = config
        self._parts = parts
        self._twistd = twistd
        self._units: dict[str, ServiceUnit] = {}
        self._page = _Page(self, config.status)
        self._departing: list[Limiter] = []
        self._shared: dict[Limiter, str | None] = {}
        self._failed: dict[tuple[str, str], str] = {}
        self._retrying: IDelayedCall | None = None
        self._changing = DeferredLock()
        self._is_reloading = False
        self._again = False
        for name in config.limiters:
            self.add_limiter(self._limiter(config, name))
        self._page.make()

    def all_limiters(self) -> list[Limiter]:
        """
        See `Program.all_limiters`: also those that the file has no more, while somebody is served by them.
        """
        return [*super().all_limiters(), *self._departing]

    def _limiter(self, config: Config, name: str) -> Limiter:
        limiter = self.role.limiter(config.limiters[name], config.shared.get(name))
        self._shared[limiter] = config.shared.get(name)
        return limiter

    def privilegedStartService(self) -> None:
        """
        Start to listen, or end the program with a sentence that says why not.
        """
        if hasattr(signal, "SIGHUP") and self.role.reads:
            signal.signal(signal.SIGHUP, lambda number, frame: self.reactor.callFromThread(self.reload))
        super().privilegedStartService()
        self._or_exit(self._start_units)

    def _start_units(self) -> None:
        for name, parts in self._parts.items():
            unit = self._units[name] = self._unit(parts, self.limiters)
            for piece in unit.wanted():
                self._open(unit, piece, [])
        self._parts = {}
        self._look_after()

    def _unit(self, parts: Parts, limiters: Mapping[str, Limiter]) -> ServiceUnit:
        make = ServiceUnit if parts.make_plugin is None else PluginUnit
        return make(parts, limiters[parts.config.limiter], self.role)

    async def _stop(self) -> None:
        self._is_stopping = True
        async with self._changing:
            pass  # what is being changed has its end, and is stopped then
        self._look_after()
        await super()._stop()

    async def _stop_services(self) -> None:
        for unit in list(self._units.values()):
            for piece in unit.opened():
                await unit.close(piece)
        await super()._stop_services()

    # Reloading

    def reload(self) -> Deferred[None]:
        """
        Read the file again, and change what has changed in it. A file that is wrong changes nothing.

        :return: fires when that is done; at once if it is being read already, and will be once more.
        """
        if self._is_stopping:
            self._log.info("{path} is not read again: the program is stopping", path=str(self._path))
            return succeed(None)
        if self._is_reloading:
            self._again = True
            return succeed(None)
        return ensureDeferred(self._reload())

    async def _reload(self) -> None:
        self._is_reloading = True
        try:
            systemd.notify_reloading()
            await self.run(source(self._path))
        except ConfigError as error:
            self._refuse(error)
        finally:
            if not self._is_stopping:
                systemd.notify("READY=1")
            self._is_reloading = False
            if self._again and not self._is_stopping:
                self._again = False
                self.reload()

    async def run(self, text: str) -> bool:
        """
        Run what a text says, instead of that which was read before. A text that is wrong changes nothing.

        :return: whether that is done.
        """
        async with self._changing:
            if self._is_stopping:
                return True
            is_done = False
            try:
                await self._change(text)
                is_done = True
                self._log.info("{path} was read again", path=str(self._path))
            except ConfigError as error:
                self._refuse(error)
            except Exception as error:
                self._log.error("{path}: nothing was changed: {error}", path=str(self._path), error=error)
            # Even if nothing was changed, ports may have been closed and opened again.
            self.role.reload(self, self._text)
        self._look_after()
        return is_done

    def _refuse(self, error: ConfigError) -> None:
        for each in error.errors:
            self._log.error("{error}", error=each)
        self._log.error("{path}: nothing was changed", path=str(self._path))

    async def _change(self, text: str) -> None:
        new = read(self._path, text)
        running = {name: unit.config for name, unit in self._units.items()}
        parts = check(self._path, new, self.reactor, self._twistd, running)
        limiters = self._limiters_of(new)
        units = {
            name: self._units[name]
            if name in self._units and not _must_restart(self._units[name], each, limiters)
            else self._unit(each, limiters)
            for name, each in parts.items()
        }
        page = self._page if new.status == self._config.status else _Page(self, new.status)
        before = {unit: unit.endpoints for unit in units.values()}
        for name, unit in units.items():
            for piece in unit.stale():
                await unit.close(piece)
            unit.endpoints = parts[name].endpoints
        old_units: list[Unit] = [*self._units.values(), self._page]
        new_units: list[Unit] = [*units.values(), page]
        closing = [
            (unit, piece)
            for unit in old_units
            for piece in unit.opened()
            if unit not in new_units or piece not in unit.wanted()
        ]
        opened: list[tuple[Unit, str]] = []
        closed: list[tuple[Unit, str]] = []
        try:
            await self._open_all(_missing(units.values()), closing, opened, closed)
        except BaseException:
            for each, piece in opened:
                await each.close(piece)
            for unit, endpoints in before.items():
                unit.endpoints = endpoints
            for each, piece in closed:
                self._try(each, piece)
            for limiter in limiters.values():
                if limiter not in self.all_limiters():
                    await self._forget(limiter)
            raise
        # From here on nothing fails.
        self._tell(units, parts)
        self._units, self._page = units, page
        self._text, self._config = text, new
        self.drain_timeout = new.drain_timeout
        self._settle_limiters(new, limiters)
        for each, piece in closing:
            if (each, piece) not in closed:
                await each.close(piece)
        for each, piece in _missing([page]):
            self._try(each, piece)

    async def _open_all(
        self,
        opening: list[tuple[Unit, str]],
        closing: list[tuple[Unit, str]],
        opened: list[tuple[Unit, str]],
        closed: list[tuple[Unit, str]],
    ) -> None:
        """
        Open some pieces; of those to be closed, close only what stands in their way.

        :param opened: has what was opened, whatever happens.
        :param closed: has what was closed.
        """
        later = []
        for unit, piece in opening:
            # Two of a plugin may not get on with each other, whatever they listen at.
            blocking = [
                each for each in closing if isinstance(unit, PluginUnit) and each[0].name == unit.name
            ]
            if not blocking:
                try:
                    self._open(unit, piece, opened)
                    continue
                except CannotListenError as error:
                    blocking = [each for each in closing if each[0].may_be_at(each[1], error.port)]
                    if not blocking:
                        raise
            later.append((unit, piece, blocking))
        for unit, piece, blocking in later:
            for each in blocking:
                if each not in closed:
                    closed.append(each)
                    await each[0].close(each[1])
            self._open(unit, piece, opened)

    def _open(self, unit: Unit, piece: str, opened: list[tuple[Unit, str]]) -> None:
        try:
            unit.open(piece)
        except NotOpened:
            return  # it is tried again
        opened.append((unit, piece))

    def _limiters_of(self, new: Config) -> dict[str, Limiter]:
        """
        The limiters of a configuration: those there are if they can be changed, or new ones.

        One that comes back while connections are still served by it is the same: what it serves counts.
        """
        limiters: dict[str, Limiter] = {}
        for name in new.limiters:
            url = new.shared.get(name)
            same = [each for each in self.all_limiters() if (each.name, self._shared[each]) == (name, url)]
            limiter = self.role.continued(name, same)
            limiters[name] = self._limiter(new, name) if limiter is None else limiter
        return limiters

    def _settle_limiters(self, new: Config, limiters: dict[str, Limiter]) -> None:
        known = self.all_limiters()
        defaults = {key: field.default for key, field in FIELDS.items()}
        self._departing = [each for each in known if each not in limiters.values()]
        for name, limiter in self.limiters.items():
            if limiter in self._departing:
                self._log.info("limiter {name} is gone", name=name)
        self.limiters = {}
        for name, limiter in limiters.items():
            if limiter in known:
                limiter.reconfigure(**{**defaults, **new.limiters[name]})
                if self._shared[limiter] is not None:
                    follow(limiter.limits, limiter.settings)
                self.limiters[name] = limiter
            else:
                self.add_limiter(limiter)
                self._log.info("limiter {name} is new", name=name)

    async def _forget(self, limiter: Limiter) -> None:
        del self._shared[limiter]
        self.role.forget(limiter)
        await close(limiter.limits)

    def _tell(self, units: dict[str, ServiceUnit], parts: dict[str, Parts]) -> None:
        """
        Let those services that go on serve in another way, and log what becomes of all.
        """
        for name in self._units:
            if name not in units:
                self._log.info("service {name} is gone; its connections may finish", name=name)
        for name, unit in units.items():
            if name not in self._units:
                self._log.info("service {name} is new", name=name)
            elif unit is not self._units[name]:
                self._log.info("service {name} is started anew", name=name)
            elif unit.config != parts[name].config:
                unit.change(parts[name])
                self._log.info("service {name} is changed", name=name)

    # What goes on without being asked for

    def _look_after(self) -> None:
        """
        Try to open what is not open, and forget limiters whose last connection has ended.
        """
        if self._retrying is not None:
            if self._retrying.active():
                self._retrying.cancel()
            self._retrying = None
        if self._is_stopping:
            return
        if not self._changing.locked:
            missing = _missing([*self._units.values(), self._page])
            wanted = {(unit.name, piece) for unit, piece in missing}
            self._failed = {key: error for key, error in self._failed.items() if key in wanted}
            tried = [self._try(unit, piece) for unit, piece in missing]
            if any(tried):
                self.role.reload(self, self._text)
            for limiter in self._departing[:]:
                if self.role.is_over(limiter):
                    self._departing.remove(limiter)
                    ensureDeferred(self._forget(limiter))
        if self._changing.locked or self._departing or _missing([*self._units.values(), self._page]):
            self._retrying = self.reactor.callLater(_RETRY_INTERVAL, self._look_after)

    def _try(self, unit: Unit, piece: str) -> bool:
        """
        Open a piece, or log once why that is impossible.
        """
        key = unit.name, piece
        try:
            unit.open(piece)
        except NotOpened:
            return False
        except Exception as error:
            if self._failed.get(key) != str(error):
                self._failed[key] = str(error)
                self._log.error(
                    "{name} cannot be started: {error}; it is tried again every second",
                    name=unit.name,
                    error=error,
                )
            return False
        if self._failed.pop(key, None) is not None:
            self._log.info("{name} is started", name=unit.name)
        return True


def _missing(units: Iterable[Unit]) -> list[tuple[Unit, str]]:
    return [(unit, piece) for unit in units for piece in unit.wanted() if piece not in unit.opened()]


def _must_restart(unit: ServiceUnit, parts: Parts, limiters: dict[str, Limiter]) -> bool:
    """
    Whether a service cannot be changed while its ports are open.
    """
    old, new = unit.config, parts.config
    return (
        unit.limiter is not limiters[new.limiter]
        or old.when_full != new.when_full
        or (old.plugin, old.tac, old.skip) != (new.plugin, new.tac, new.skip)
        or (isinstance(unit, PluginUnit) and bool(unit.stale()))
    )
