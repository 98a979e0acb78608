"""
A program that is described by a configuration file, and changes with it while it runs.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import attrs
from twisted.application.service import IService
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred, succeed
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger
from twisted.python.failure import Failure

from connlimit import _systemd
from connlimit._accepting import WatchedEndpoint
from connlimit._config import Config, ServiceConfig, read
from connlimit._endpoints import client_endpoint, server_endpoint
from connlimit._factory import LimitingFactory
from connlimit._forward import RelayFactory
from connlimit._limiter import Limiter
from connlimit._program import Program
from connlimit._role import Alone
from connlimit._serving import import_factory, limited_plugin, plugin_options
from connlimit._settings import FIELDS, Settings
from connlimit._sharing import shared_limits
from connlimit._toml import ConfigError
from connlimit.status import status_service


@attrs.frozen
class _Parts:
    """
    What a service is made of, found and checked before anything is changed.
    """

    config: ServiceConfig
    endpoints: dict[str, Any]
    factory: IProtocolFactory | None
    plugin_options: Any


def check(path: Path, config: Config, reactor: Any) -> dict[str, _Parts]:
    """
    Find everything that the services name.

    :raises ConfigError: with all that cannot be found.
    """
    parts, errors = {}, []
    for name, service in config.services.items():
        try:
            parts[name] = _parts(service, reactor)
        except ValueError as error:
            errors.append(f"{path}: [services.{name}] {error}")
    if config.status is not None:
        try:
            server_endpoint(reactor, config.status.listen, "listen")
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


def _parts(service: ServiceConfig, reactor: Any) -> _Parts:
    endpoints = {each: server_endpoint(reactor, each, "listen") for each in service.listen}
    factory: Any = None
    options = None
    if service.forward is not None:
        factory = RelayFactory(client_endpoint(reactor, service.forward, "forward"), service.forward)
    elif service.factory is not None:
        factory = import_factory(service.factory, "factory")
    else:
        options = plugin_options(service.plugin[0], list(service.plugin[1:]))
    return _Parts(service, endpoints, factory, options)


class _Unit:
    """
    A service that runs.
    """

    def __init__(self, parts: _Parts, limiter: Limiter, role: Alone) -> None:
        self._role = role
        self.config = parts.config
        self.limiter = limiter
        self.ports: dict[str, IListeningPort] = {}
        self.factory: Any = LimitingFactory(parts.factory, limiter) if parts.factory is not None else None
        self.plugin: IService | None = None
        if parts.factory is None:
            name = parts.config.plugin[0]
            service = limited_plugin(name, parts.plugin_options, limiter, parts.config.when_full)
            self.plugin = role.plugin(service)

    def listen(self, parts: _Parts) -> None:
        """
        Listen where the parts say and it does not listen yet; all or none.
        """
        new = {each: endpoint for each, endpoint in parts.endpoints.items() if each not in self.ports}
        opened: dict[str, IListeningPort] = {}
        try:
            for each, endpoint in new.items():
                watched = WatchedEndpoint(endpoint, self.limiter, parts.config.when_full)
                with self._role.listening():
                    opened[each] = _at_once(watched.listen(self.factory))
        except Exception:
            for port in opened.values():
                port.stopListening()
            raise
        self.ports.update(opened)

    def start(self) -> None:
        """
        Start a plugin's service.
        """
        if self.plugin is not None:
            with self._role.listening():
                self.plugin.privilegedStartService()
                self.plugin.startService()

    async def close(self, keeping: tuple[str, ...] = ()) -> None:
        """
        Stop listening, except at some endpoints.
        """
        for each in [each for each in self.ports if each not in keeping]:
            await maybeDeferred(self.ports.pop(each).stopListening)
        if self.plugin is not None and not keeping:
            await maybeDeferred(self.plugin.stopService)


def _at_once(deferred: Deferred[Any]) -> Any:
    """
    The result of a Deferred that has fired.
    """
    results: list[Any] = []
    deferred.addBoth(results.append)
    if not results:
        raise OSError("an endpoint that does not listen at once cannot be used here")
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]


class ConfiguredProgram(Program):
    """
    Runs what a file says; SIGHUP reads it again.
    """

    _log = Logger()

    def __init__(
        self, path: Path, config: Config, parts: dict[str, _Parts], reactor: Any, role: Alone | None = None
    ) -> None:
        """
        :param parts: what `check` found for the configuration.
        """
        super().__init__(config.drain_timeout, config.log_connections, role)
        self._path = path.absolute()
        self._config = config
        self._parts = parts
        self._reactor = reactor
        self._units: dict[str, _Unit] = {}
        self._is_reloading = False
        self._again = False
        for name in config.limiters:
            self.add_limiter(self._limiter(config, name))
        if config.status is not None and self.role.shows:
            self.status = self._status_service(config)

    def _limiter(self, config: Config, name: str) -> Limiter:
        return self.role.limiter(config.limiters[name], config.shared.get(name))

    def _status_service(self, config: Config) -> IService:
        assert config.status is not None
        endpoint = server_endpoint(self._reactor, config.status.listen)
        return status_service(
            endpoint, self.role.watched(self), config.status.show_peers, config.status.hosts
        )

    def privilegedStartService(self) -> None:
        """
        Start to listen, or end the program with a sentence that says why not.
        """
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda number, frame: self._reactor.callFromThread(self.reload))
        super().privilegedStartService()
        self._or_exit(self._start_units)

    def _start_units(self) -> None:
        for name, parts in self._parts.items():
            unit = self._units[name] = _Unit(parts, self.limiters[parts.config.limiter], self.role)
            unit.listen(parts)
            unit.start()

    async def _stop(self) -> None:
        for unit in self._units.values():
            await unit.close()
        await super()._stop()

    def reload(self) -> Deferred[None]:
        """
        Read the file again, and change what has changed in it. A file that is wrong changes nothing.

        :return: fires when that is done; at once if it is being read already, and will be once more.
        """
        if self._is_reloading:
            self._again = True
            return succeed(None)
        return ensureDeferred(self._reload())

    async def _reload(self) -> None:
        self._is_reloading = True
        try:
            _systemd.notify_reloading()
            await self._apply()
        except ConfigError as error:
            for each in error.errors:
                self._log.error("{error}", error=each)
            self._log.error("{path}: nothing was changed", path=str(self._path))
        except Exception as error:
            self._log.error("{path}: nothing was changed: {error}", path=str(self._path), error=error)
        finally:
            _systemd.notify("READY=1")
            self._is_reloading = False
            if self._again:
                self._again = False
                self.reload()

    async def _apply(self) -> None:
        new = read(self._path)
        parts = check(self._path, new, self._reactor)
        old = self._config
        # First what can fail: new limiters cost nothing, and new ports can be closed again.
        limiters = {
            name: self.limiters[name] if self._is_kept(new, name) else self._limiter(new, name)
            for name in new.limiters
        }
        restarted = {
            name
            for name, unit in self._units.items()
            if name in parts and _must_restart(unit, parts[name], limiters)
        }
        added = {
            name: _Unit(parts[name], limiters[parts[name].config.limiter], self.role)
            for name in parts
            if name not in self._units or name in restarted
        }
        listening: list[_Unit] = []
        try:
            for name, each in parts.items():
                if name not in restarted:
                    unit = added.get(name) or self._units[name]
                    unit.listen(each)
                    listening.append(unit)
        except Exception:
            for unit in listening:
                await unit.close(unit.config.listen if unit in self._units.values() else ())
            raise
        # From here on nothing fails but the restart of a service.
        self._config = new
        self.drain_timeout = new.drain_timeout
        for name, settings in new.limiters.items():
            if limiters[name] is self.limiters.get(name):
                defaults = {key: field.default for key, field in FIELDS.items()}
                limiters[name].reconfigure(**{**defaults, **settings})
            else:
                self.add_limiter(limiters[name])
                self._log.info("limiter {name} is new", name=name)
        for name in [name for name in self.limiters if name not in limiters]:
            del self.limiters[name]
            self._log.info("limiter {name} is gone", name=name)
        for name in [name for name in self._units if name not in parts]:
            await self._units.pop(name).close()
            self._log.info("service {name} is gone; its connections may finish", name=name)
        for name, each in parts.items():
            if name in restarted:
                await self._units[name].close()
                try:
                    added[name].listen(each)
                except Exception as error:
                    self._log.error("service {name} cannot be started: {error}", name=name, error=error)
            if name in added:
                self._log.info(
                    "service {name} is {what}", name=name, what="started anew" if name in restarted else "new"
                )
                self._units[name] = added[name]
                added[name].start()
            elif each.config != self._units[name].config:
                await self._change(self._units[name], each)
        if new.status != old.status and self.role.shows:
            await self._change_status(new)
        self.role.reload(self)
        self._log.info("{path} was read again", path=str(self._path))

    def _is_kept(self, new: Config, name: str) -> bool:
        """
        Whether a limiter can be changed, and need not be made anew since it is shared with others.
        """
        return name in self.limiters and new.shared.get(name) == self._config.shared.get(name)

    async def _change(self, unit: _Unit, parts: _Parts) -> None:
        """
        Let a service serve in another way, or listen elsewhere, without touching a connection.
        """
        served = (unit.config.forward, unit.config.factory)
        assert unit.factory is not None
        if served != (parts.config.forward, parts.config.factory) and parts.factory is not None:
            unit.factory.wrappedFactory = parts.factory
            unit.limiter.budget.expect(parts.factory)
        unit.config = parts.config
        await unit.close(parts.config.listen)
        self._log.info("service {name} is changed", name=parts.config.name)

    async def _change_status(self, config: Config) -> None:
        if self.status is not None:
            await maybeDeferred(self.status.stopService)
            self.status = None
        if config.status is not None:
            self.status = self._status_service(config)
            try:
                self.status.privilegedStartService()
                self.status.startService()
            except Exception as error:
                self._log.error("the status page cannot be started: {error}", error=error)
                self.status = None


def _must_restart(unit: _Unit, parts: _Parts, limiters: dict[str, Limiter]) -> bool:
    """
    Whether a service cannot be changed while its ports are open.
    """
    old, new = unit.config, parts.config
    return (
        unit.limiter is not limiters[new.limiter]
        or old.when_full != new.when_full
        or old.plugin != new.plugin
    )
