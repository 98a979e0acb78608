"""
What can be limited, by its name: factories, and other twistd plugins.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twisted.application.internet import SSLServer, StreamServerEndpointService, TCPServer, UNIXServer
from twisted.application.service import IService, IServiceCollection, IServiceMaker
from twisted.internet.interfaces import IProtocolFactory
from twisted.plugin import getPlugins
from twisted.python import usage
from twisted.python.reflect import namedAny

from connlimit._accepting import WatchedEndpoint
from connlimit._factory import LimitingFactory
from connlimit._limiter import Limiter


def import_factory(name: str, option: str = "--factory") -> IProtocolFactory:
    """
    The factory that ``MODULE:NAME`` names, or that what it names returns when it is called.

    :raises ValueError: if there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{option} must be MODULE:NAME, such as mypackage.server:factory, not {name!r}")
    # Where the user stands, as for python -m; twistd alone does not look there.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
        found = namedAny(f"{module}.{attribute}")
        if not IProtocolFactory.providedBy(found) and callable(found):
            found = found()
    except Exception as error:
        raise ValueError(f"{option} {name} failed: {type(error).__name__}: {error}") from None
    if not IProtocolFactory.providedBy(found):
        raise ValueError(
            f"{option} must name a factory, or a callable that returns one; {name} gave {found!r}"
        )
    return found


def plugins() -> list[Any]:
    """
    All other twistd plugins, by name.
    """
    found = sorted(getPlugins(IServiceMaker), key=lambda plugin: plugin.tapname)
    return [plugin for plugin in found if plugin.tapname != "connlimit"]


def plugin_options(name: str, arguments: list[str], twistd: usage.Options | None = None) -> usage.Options:
    """
    A plugin's options for a command line.

    :param twistd: the options of twistd itself.
    :raises ValueError: if there is no such plugin, or its command line is wrong.
    """
    plugin = _plugin(name)
    options: usage.Options = plugin.options()
    try:
        with as_if_alone(name, options, twistd):
            options.parseOptions(arguments)
    except (usage.UsageError, SystemExit) as error:
        raise ValueError(f"plugin {name} does not take these arguments: {error}") from None
    except Exception as error:
        raise ValueError(f"plugin {name} fails with these arguments: {_reason(error)}") from None
    return options


@contextmanager
def as_if_alone(name: str, options: usage.Options, twistd: usage.Options | None) -> Iterator[None]:
    """
    A context in which a plugin finds the options of twistd as if that had been told to run it.

    :param options: the plugin's.
    :param twistd: those of twistd itself; None if they are not known.
    """
    options.parent = twistd
    if twistd is None:
        yield
        return
    told = twistd.subCommand, getattr(twistd, "subOptions", None)
    twistd.subCommand, twistd.subOptions = name, options
    try:
        yield
    finally:
        twistd.subCommand, twistd.subOptions = told


def made_plugin(
    name: str, options: usage.Options, when_full: str = "refuse", setting: str = "--when-full"
) -> IService:
    """
    The service of a plugin, which `limit_service` can limit.

    :param setting: what *when_full* is called where it was given.
    :raises ValueError: if it cannot be made, or cannot be limited.
    """
    try:
        with as_if_alone(name, options, options.parent):
            service: IService = _plugin(name).makeService(options)
        listening = list(listening_services(service))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be made with these options: {_reason(error)}") from None
    if not listening:
        raise ValueError(f"{name} has no service that listens, so there is nothing to limit")
    if when_full != "refuse" and not all(isinstance(each, StreamServerEndpointService) for each in listening):
        raise ValueError(
            f"{setting} must be refuse, not {when_full}, for {name}, which listens without endpoints"
        )
    return service


def _reason(error: BaseException) -> str:
    """
    What an error says; its name as well, if it alone says little.
    """
    return (
        str(error)
        if isinstance(error, (ValueError, usage.UsageError))
        else f"{type(error).__name__}: {error}"
    )


def limited_plugin(name: str, options: usage.Options, limiter: Limiter, when_full: str) -> IService:
    """
    The service of a plugin, the limiter before all that listens in it.

    :raises ValueError: if it cannot be made, or nothing in it can be limited.
    """
    service = made_plugin(name, options, when_full)
    limit_service(service, limiter, when_full)
    return service


def _plugin(name: str) -> Any:
    for plugin in plugins():
        if plugin.tapname == name:
            return plugin
    raise ValueError(f"there is no twistd plugin {name}")


def limit_service(service: IService, limiter: Limiter, when_full: str = "refuse") -> int:
    """
    Put the limiter before every factory that listens in a tree of services.

    :return: how many were found.
    """
    found = 0
    for each in listening_services(service):
        _limit(each, limiter, when_full)
        found += 1
    return found


def listening_services(service: IService) -> Iterator[Any]:
    """
    The services that listen, in a tree of services.
    """
    if isinstance(service, (StreamServerEndpointService, TCPServer, SSLServer, UNIXServer)):
        yield service
    for each in IServiceCollection(service, ()):
        yield from listening_services(each)


def _limit(service: Any, limiter: Limiter, when_full: str) -> None:
    if isinstance(service, StreamServerEndpointService):
        # If it cannot listen it does not start, as one of strports.service.
        service._raiseSynchronously = True
        service.factory = LimitingFactory(service.factory, limiter)
        service.endpoint = WatchedEndpoint(service.endpoint, limiter, when_full)
    else:
        # They keep the arguments of listenTCP and its like; the factory is the second.
        if "factory" in service.kwargs:
            service.kwargs["factory"] = LimitingFactory(service.kwargs["factory"], limiter)
        else:
            where, factory, *rest = service.args
            service.args = (where, LimitingFactory(factory, limiter), *rest)
