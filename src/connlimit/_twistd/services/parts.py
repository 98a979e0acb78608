"""
What services are made of, found and checked before anything is started or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeVar

import attrs
from twisted.application.service import IProcess, IService
from twisted.internet.interfaces import IProtocolFactory
from twisted.python import usage

from connlimit._limiter.limiter import Limiter
from connlimit._listening.checked_endpoints import client_endpoint, server_endpoint, status_endpoint
from connlimit._listening.service import check_factory, limit_service, to_limit
from connlimit._twistd.config import Config, ServiceConfig, Spelling
from connlimit._twistd.targets import demonstration
from connlimit._twistd.targets.by_name import import_factory, load_application, made_plugin, plugin_options
from connlimit._twistd.targets.relay import RelayFactory
from connlimit._twistd.toml import ConfigError
from connlimit.shared.by_url import shared_limits

T = TypeVar("T")


@attrs.frozen
class Parts:
    """
    What a service is made of.

    :ivar endpoints: where it listens, by what was said.
    :ivar make_factory: makes what it serves with; None for a plugin or an application.
    :ivar make_plugin: makes the service of a plugin or an application, the limiter before all that listens.
    :ivar hints: what there is to see and to try.
    """

    config: ServiceConfig
    endpoints: dict[str, Any]
    make_factory: Callable[[Limiter], IProtocolFactory] | None
    make_plugin: Callable[[Limiter], IService] | None = None
    hints: tuple[str, ...] = ()


def check(
    config: Config,
    spelling: Spelling,
    reactor: Any,
    twistd: usage.Options | None = None,
    running: Collection[str] = (),
) -> dict[str, Parts]:
    """
    Find everything that the start needs, and make what the services are made of.

    :param twistd: the options of twistd itself, for plugins that look at them.
    :param running: the names of services that run already as the config says: their plugins are not made.
    :raises ConfigError: with all that cannot be found.
    """
    parts: dict[str, Parts] = {}
    errors: list[str] = []
    for name, service in config.services.items():
        finder = _Finder(service, spelling, reactor, twistd, config)
        parts[name] = finder.parts(name in running)
        errors += [f"{spelling.where('services', name)}{each}" for each in finder.errors]
    if config.status is not None:
        try:
            called = "listen" if spelling.file else spelling.name("status")
            status_endpoint(reactor, config.status.listen, called)
        except ValueError as error:
            errors.append(f"{spelling.where('status')}{error}")
    for name, limiter in config.limiters.items():
        try:
            shared_limits(limiter.shared, limiter.settings, spelling.name)  # whether it can be made
        except ValueError as error:
            errors.append(f"{spelling.where('limiters', name)}{error}")
    if errors:
        raise ConfigError(errors)
    return parts


class _Finder:
    """
    Finds what one service is made of, and collects what cannot be found.
    """

    def __init__(
        self,
        service: ServiceConfig,
        spelling: Spelling,
        reactor: Any,
        twistd: usage.Options | None,
        config: Config,
    ) -> None:
        self.errors: list[str] = []
        self._service = service
        self._spelling = spelling
        self._reactor = reactor
        self._twistd = twistd
        self._status = None if config.status is None else config.status.listen

    def parts(self, is_running: bool) -> Parts:
        """
        What the service is made of, as far as that is found.
        """
        service, spell = self._service, self._spelling.name
        endpoints: dict[str, Any] = {}
        for number, where in enumerate(service.listen):
            # It may be the same more than once: there are many ports 0.
            name = where if where not in endpoints else f"{where} ({number + 1})"
            endpoints[name] = self._found(server_endpoint, self._reactor, where, spell("listen"))
        if service.plugin or service.tac is not None:
            return Parts(service, endpoints, None, self._plugin(is_running))
        hints: tuple[str, ...] = ()
        make: Callable[[Limiter], IProtocolFactory]
        if service.forward is not None:
            backend = self._found(client_endpoint, self._reactor, service.forward, spell("forward"))
            relay = RelayFactory(backend, service.forward, service.relay)
            self._found(self._limitable, relay)
            make = partial(_always, relay)
        elif service.factory is not None:
            factory = self._found(import_factory, service.factory, spell("factory"))
            if factory is not None:
                self._found(self._limitable, factory)
            make = partial(_always, factory)
        else:
            make = partial(_demonstration, self._reactor, self._status)
            hints = demonstration.hints(list(service.listen), self._status)
        return Parts(service, endpoints, make, None, hints)

    def _limitable(self, factory: IProtocolFactory) -> None:
        if self._service.per == "request":
            check_factory(factory, self._spelling.name("per"))

    def _plugin(self, is_running: bool) -> Callable[[Limiter], IService]:
        options = made = None
        if self._service.plugin:
            name, *arguments = self._service.plugin
            options = self._found(plugin_options, name, arguments, self._twistd, self._spelling.file is None)
        if not self.errors and not is_running:
            made = self._found(self._made, options)
        return partial(self._limited, options, made)

    def _found(self, find: Callable[..., T], *arguments: Any) -> Any:
        try:
            return find(*arguments)
        except ValueError as error:
            self.errors.append(str(error))
            return None

    def _made(self, options: usage.Options | None) -> IService:
        """
        The service of a plugin or of an application, which can be limited.

        :raises ValueError: if it cannot be made, or cannot be limited.
        """
        service, spell = self._service, self._spelling.name
        if service.tac is None:
            assert options is not None
            return made_plugin(
                service.plugin[0], options, service.when_full, service.skip, spell, service.per
            )
        application = load_application(service.tac, spell("tac"))
        to_limit(application, service.when_full, service.skip, service.tac, spell, service.per)
        self._take_user(application)
        return IService(application)

    def _take_user(self, application: Any) -> None:
        """
        Let twistd run as the user of an application. A file may change while it runs, and twistd not then.
        """
        process, twistd = IProcess(application, None), self._twistd
        for name in ("uid", "gid"):
            wanted = getattr(process, name, None)
            if wanted is None or twistd is None or twistd.get(name, wanted) is not None:
                continue
            if self._spelling.file is not None:
                raise ValueError(
                    f"tac {self._service.tac} wants the {name} {wanted}: run twistd with --{name} {wanted}"
                )
            twistd[name] = wanted

    def _limited(self, options: usage.Options | None, made: IService | None, limiter: Limiter) -> IService:
        service = self._service
        if made is None:
            made = self._made(options)
        limit_service(made, limiter, service.when_full, service.skip, service.per)
        return made


def _always(factory: IProtocolFactory, limiter: Limiter) -> IProtocolFactory:
    return factory


def _demonstration(reactor: Any, status: str | None, limiter: Limiter) -> IProtocolFactory:
    return demonstration.site(limiter, reactor, status)
