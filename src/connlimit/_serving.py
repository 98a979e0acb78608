"""
What can be limited, by its name: factories, and other twistd plugins.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
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


def plugin_options(name: str, arguments: list[str]) -> usage.Options:
    """
    A plugin's options for a command line.

    :raises ValueError: if there is no such plugin, or its command line is wrong.
    """
    plugin = _plugin(name)
    options: usage.Options = plugin.options()
    try:
        options.parseOptions(arguments)
    except (usage.UsageError, SystemExit) as error:
        raise ValueError(f"plugin {name} does not take these arguments: {error}") from None
    return options


def limited_plugin(name: str, options: usage.Options, limiter: Limiter, when_full: str) -> IService:
    """
    The service of a plugin, the limiter before all that listens in it.

    :raises ValueError: if it cannot be made, or nothing in it can be limited.
    """
    try:
        service: IService = _plugin(name).makeService(options)
    except Exception as error:
        raise ValueError(f"{name} cannot be made with these options: {error}") from None
    if not limit_service(service, limiter, when_full):
        raise ValueError(f"{name} has no service that listens, so there is nothing to limit")
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
        service.factory = LimitingFactory(service.factory, limiter)
        service.endpoint = WatchedEndpoint(service.endpoint, limiter, when_full)
    else:
        if when_full != "refuse":
            raise ValueError(
                f"--when-full must be refuse, not {when_full}, for a plugin that listens in the"
                " way of this one"
            )
        # They keep the arguments of listenTCP and its like; the factory is the second.
        if "factory" in service.kwargs:
            service.kwargs["factory"] = LimitingFactory(service.kwargs["factory"], limiter)
        else:
            where, factory, *rest = service.args
            service.args = (where, LimitingFactory(factory, limiter), *rest)
