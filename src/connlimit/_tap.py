"""
The command line: ``twistd connlimit``.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from twisted.application.internet import SSLServer, StreamServerEndpointService, TCPServer, UNIXServer
from twisted.application.service import IService, IServiceCollection, IServiceMaker, MultiService
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import clientFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IProtocolFactory
from twisted.logger import Logger
from twisted.plugin import getPlugins
from twisted.python import usage
from twisted.python.reflect import namedAny

from connlimit import _demonstration, _descriptors
from connlimit._accepting import WatchedEndpoint, check_when_full
from connlimit._factory import LimitingFactory
from connlimit._forward import RelayFactory
from connlimit._limiter import Limiter
from connlimit._proxied import server_from_string
from connlimit._service import LimitedService
from connlimit._settings import FIELDS, parse

_log = Logger()

# More than any kernel holds: it takes its own maximum (somaxconn) instead.
_BACKLOG = 65535


def _spell(setting: str) -> str:
    return "--" + setting.replace("_", "-")


class CannotStart(SystemExit, Exception):
    """
    The service cannot start; the sentence says why.

    As an Exception it lets twistd clean up and tell its parent, as a SystemExit it ends the process with
    the sentence and exit code 1, without a traceback.
    """


class Options(usage.Options):
    """
    The options of ``twistd connlimit``.
    """

    synopsis = (
        "[limits] [--listen ENDPOINT]... [--forward ENDPOINT | --factory MODULE:NAME]"
        "  or  [limits] PLUGIN [its options]"
    )
    longdesc = (
        "Serves so many connections at once and lets the others wait in line, paused. What is limited: "
        "another server (--forward), a factory (--factory), or any other twistd plugin, named after the "
        "limits, with options of its own. With nothing to limit, a slow web page shows how it works."
    )
    optParameters = [
        [name.replace("_", "-"), None, None, f"{field.metadata['help']} [{field.metadata['unit'] or 'text'}]"]
        for name, field in FIELDS.items()
    ] + [
        [
            "when-full",
            None,
            "refuse",
            "what a port does when there is no place for one more: refuse, or stop-accepting",
        ],
        [
            "drain-timeout",
            None,
            "0",
            "how long the connections that are served may take to end when the program is stopped [seconds]",
        ],
        ["forward", None, None, "relay to the server at this client endpoint, such as tcp:localhost:9000"],
        ["factory", None, None, "serve with this factory, or what this callable returns, as MODULE:NAME"],
    ]

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, description: str) -> None:
        """
        listen at this server endpoint, such as tcp:8080; can be given several times
        """
        self["listen"].append(description)

    @property
    def subCommands(self) -> Iterator[tuple[str, None, Callable[[], usage.Options], str]]:
        """
        All other twistd plugins, as those that can be limited.
        """
        for plugin in sorted(getPlugins(IServiceMaker), key=lambda plugin: plugin.tapname):
            if plugin.tapname != "connlimit":
                yield plugin.tapname, None, lambda plugin=plugin: plugin.options(), plugin.description  # type: ignore[misc]

    def parseOptions(self, options: list[str] | None = None) -> None:
        """
        Parse the command line, or exit with one sentence that says what is wrong with it.
        """
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            raise CannotStart(f"connlimit: {error}") from None

    def postOptions(self) -> None:
        """
        Check everything that can be checked before anything is started.
        """
        given = {name: self[name.replace("_", "-")] for name in FIELDS}
        try:
            self["drain"] = _seconds("--drain-timeout", self["drain-timeout"])
            check_when_full(None, None, self["when-full"], _spell("when_full"))
            self["settings"] = parse({k: v for k, v in given.items() if v is not None}, _spell)
        except ValueError as error:
            raise usage.UsageError(str(error)) from None

        targets = [f"--{name}" for name in ("forward", "factory") if self[name]]
        if self.subCommand:
            targets.append(self.subCommand)
            if self["listen"]:
                raise usage.UsageError(
                    f"--listen must be left out before a plugin: {self.subCommand} listens by its own options"
                )
        if len(targets) > 1:
            raise usage.UsageError(f"only one of {' and '.join(targets)} can be limited")
        if not targets:
            self["settings"].setdefault("max_connections", _demonstration.MAX_CONNECTIONS)
            self["listen"] = self["listen"] or [_demonstration.LISTEN]
        elif not self.subCommand and not self["listen"]:
            raise usage.UsageError(f"{targets[0]} needs --listen, such as --listen tcp:8080")

        from twisted.internet import reactor

        self["endpoints"] = [_server_endpoint(reactor, each) for each in self["listen"]]
        if self["forward"]:
            self["backend"] = _endpoint(
                "--forward", self["forward"], "tcp:localhost:9000", clientFromString, reactor
            )
        if self["factory"]:
            self["served"] = _import_factory(self["factory"])


def _seconds(option: str, text: str) -> float:
    try:
        value = float(text)
        if 0 <= value < math.inf:
            return value
    except ValueError:
        pass
    raise ValueError(f"{option} must be a number of seconds, 0 or more, not {text!r}")


def _server_endpoint(reactor: Any, description: str) -> Any:
    """
    The endpoint to listen at, with the longest backlog the kernel has, where it has one and none is given.
    """
    if "backlog=" not in description:
        try:
            return server_from_string(reactor, f"{description}:backlog={_BACKLOG}")
        except Exception:  # whatever is wrong is found and told without the backlog
            pass
    return _endpoint("--listen", description, "tcp:8080", server_from_string, reactor)


def _endpoint(option: str, description: str, example: str, make: Callable[..., Any], reactor: Any) -> Any:
    try:
        return make(reactor, description)
    except Exception as error:
        raise usage.UsageError(
            f"{option} must be an endpoint such as {example}, not {description!r} ({error})"
        ) from None


def _import_factory(name: str) -> IProtocolFactory:
    """
    The factory that ``MODULE:NAME`` names, or that what it names returns when it is called.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise usage.UsageError(
            f"--factory must be MODULE:NAME, such as mypackage.server:factory, not {name!r}"
        )
    # Where the user stands, as for python -m; twistd alone does not look there.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
        found = namedAny(f"{module}.{attribute}")
        if not IProtocolFactory.providedBy(found) and callable(found):
            found = found()
    except Exception as error:
        raise usage.UsageError(f"--factory {name} failed: {type(error).__name__}: {error}") from None
    if not IProtocolFactory.providedBy(found):
        raise usage.UsageError(
            f"--factory must name a factory, or a callable that returns one; {name} gave {found!r}"
        )
    return found


def makeService(options: Options) -> MultiService:
    """
    The service that the options ask for.
    """
    from twisted.internet import reactor

    limiter = Limiter(**options["settings"])
    service = _LimitedProgram(limiter, options["drain"])
    if options.subCommand:
        _add_plugin(service, options, limiter)
        return service
    if options["forward"]:
        factory: Any = RelayFactory(options["backend"], options["forward"])
    elif options["factory"]:
        factory = options["served"]
    else:
        factory = _demonstration.site(limiter, reactor)
        service.hints = _demonstration.hints(options["listen"])
    for endpoint in options["endpoints"]:
        LimitedService(endpoint, factory, limiter, when_full=options["when-full"]).setServiceParent(service)
    return service


def _add_plugin(service: MultiService, options: Options, limiter: Limiter) -> None:
    name = options.subCommand
    plugin = next(each for each in getPlugins(IServiceMaker) if each.tapname == name)
    try:
        inner = plugin.makeService(options.subOptions)
    except Exception as error:
        raise CannotStart(f"connlimit: {name} cannot be made with these options: {error}") from None
    if not limit_service(inner, limiter, options["when-full"]):
        raise CannotStart(f"connlimit: {name} has no service that listens, so there is nothing to limit")
    inner.setServiceParent(service)


def limit_service(service: IService, limiter: Limiter, when_full: str = "refuse") -> int:
    """
    Put the limiter before every factory that listens in a tree of services.

    :return: how many were found.
    """
    found = 0
    if isinstance(service, StreamServerEndpointService):
        service.factory = LimitingFactory(service.factory, limiter)
        service.endpoint = WatchedEndpoint(service.endpoint, limiter, when_full)
        found = 1
    elif isinstance(service, (TCPServer, SSLServer, UNIXServer)):
        if when_full != "refuse":
            raise CannotStart(
                f"connlimit: --when-full must be refuse, not {when_full}, for a plugin that listens in the"
                " way of this one"
            )
        # They keep the arguments of listenTCP and its like; the factory is the second.
        if "factory" in service.kwargs:
            service.kwargs["factory"] = LimitingFactory(service.kwargs["factory"], limiter)
        else:
            where, factory, *rest = service.args
            service.args = (where, LimitingFactory(factory, limiter), *rest)
        found = 1
    return found + sum(limit_service(each, limiter, when_full) for each in IServiceCollection(service, ()))


class _LimitedProgram(MultiService):
    """
    Everything that one ``twistd connlimit`` runs.
    """

    def __init__(self, limiter: Limiter, drain_timeout: float) -> None:
        super().__init__()
        self._limiter = limiter
        self._drain_timeout = drain_timeout
        self.hints: tuple[str, ...] = ()

    def privilegedStartService(self) -> None:
        """
        Raise the descriptor limit and start to listen, or end the program with a sentence that says why not.
        """
        _descriptors.raise_limit()
        self._or_exit(super().privilegedStartService)

    def startService(self) -> None:
        """
        Start what listens without privileges, and say what there is.
        """
        from twisted.internet import reactor

        self._or_exit(super().startService)
        reactor.callWhenRunning(_exit_cleanly, reactor)
        _log.info("{budget}", budget=_budget(self._limiter))
        for hint in self.hints:
            _log.info("{hint}", hint=hint)

    def stopService(self) -> Deferred[Any]:
        """
        Stop listening, refuse the line, let those who are served finish in time, and end the others.
        """
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        await super().stopService()
        limiter = self._limiter
        before = limiter.snapshot()
        if before.active or before.exempt:
            _log.info(
                "{limiter}: {active} connections may finish within {seconds} s",
                limiter=limiter.name,
                active=before.active + before.exempt,
                seconds=self._drain_timeout,
            )
        await limiter.drain(self._drain_timeout)
        after = limiter.snapshot()
        _log.info(
            "{limiter}: drained: {served} connections were served and {refused} refused in all",
            limiter=limiter.name,
            served=after.served,
            refused=sum(after.refused.values()),
        )

    def _or_exit(self, start: Callable[[], None]) -> None:
        try:
            start()
        except (CannotListenError, OSError) as error:
            raise CannotStart(f"connlimit: {error}") from None


def _budget(limiter: Limiter) -> str:
    """
    One sentence on how many connections there can be.
    """
    served, waiting, descriptors = limiter.max_connections, limiter.max_waiting, _descriptors.limit()
    facts = [f"{'any number' if served is None else served} served at once"]
    if descriptors is not None:
        kept_free = _descriptors.reserve(descriptors)
        facts.insert(0, f"{descriptors} descriptors, {kept_free} of them kept free of those who wait")
        room = max(0, descriptors - kept_free - (served or 0))
        waiting = room if waiting is None else min(room, waiting)
    facts.append(f"room for {'any number' if waiting is None else waiting} in the line")
    return f"{limiter.name}: " + ", ".join(facts)


def _exit_cleanly(reactor: Any) -> None:
    """
    Make SIGTERM an order to stop that is carried out with exit code 0; a second one ends the process at once.

    Twisted's own handler stops as well, but then lets the process die of the signal.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        reactor.callFromThread(reactor.stop)

    signal.signal(signal.SIGTERM, stop)
