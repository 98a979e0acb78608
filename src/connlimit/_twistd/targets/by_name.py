"""
What can be limited, by its name: factories, other twistd plugins, and the applications of files.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.application.service import IService, IServiceMaker, loadApplication
from twisted.internet.interfaces import IProtocolFactory
from twisted.plugin import getPlugins
from twisted.python import usage
from twisted.python.reflect import namedAny

from connlimit._limiter.values import did_you_mean
from connlimit._listening.checked_endpoints import why
from connlimit._listening.service import to_limit


def look_where_the_user_stands() -> None:
    """
    Let modules be found in the current directory, as python -m does; twistd alone does not.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def import_factory(name: str, option: str = "--factory") -> IProtocolFactory:
    """
    The factory that ``MODULE:NAME`` names, or that what it names returns when it is called.

    :raises ValueError: if there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{option} must be MODULE:NAME, such as mypackage.server:factory, not {name!r}")
    look_where_the_user_stands()
    try:
        importlib.import_module(module)
        found = namedAny(f"{module}.{attribute}")
        if not IProtocolFactory.providedBy(found) and callable(found):
            found = found()
    except Exception as error:
        raise ValueError(f"{option} {name} failed: {_reason(error)}") from None
    if not IProtocolFactory.providedBy(found):
        raise ValueError(
            f"{option} must name a factory, or a function that returns one; {name} gave {found!r}"
        )
    return found


def load_application(file: str, option: str = "--tac") -> Any:
    """
    The application of a ``.tac`` file.

    :raises ValueError: if there is none.
    """
    look_where_the_user_stands()
    try:
        application = loadApplication(file, "python")
        IService(application)
    except OSError as error:
        raise ValueError(f"{option} {file} cannot be read: {error.strerror}") from None
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, KeyError) and error.args == ("application",)
        what = "it has no application" if is_missing else _reason(error)
        raise ValueError(f"{option} {file} failed: {what}") from None
    return application


def _reason(error: BaseException) -> str:
    """
    What an error says in one line; its name as well, if it alone says little.
    """
    return " ".join((str(error) if isinstance(error, usage.UsageError) else why(error)).split())


def plugins() -> list[Any]:
    """
    All other twistd plugins, by name.
    """
    found = sorted(getPlugins(IServiceMaker), key=lambda plugin: plugin.tapname)
    return [plugin for plugin in found if plugin.tapname != "connlimit"]


def plugin_options(
    name: str, arguments: list[str], twistd: usage.Options | None = None, may_exit: bool = False
) -> usage.Options:
    """
    A plugin's options for a command line.

    :param twistd: the options of twistd itself.
    :param may_exit: whether the process may end in order here, as by ``--help``.
    :raises ValueError: if there is no such plugin, or its command line is wrong.
    """
    plugin = _plugin(name)
    options: usage.Options = plugin.options()
    try:
        with as_if_alone(name, options, twistd):
            options.parseOptions(arguments)
    except (usage.UsageError, SystemExit) as error:
        if may_exit and isinstance(error, SystemExit) and not error.code:
            raise
        raise ValueError(
            f"plugin {name} does not take these arguments: {_explained(error, options)}"
        ) from None
    except Exception as error:
        raise ValueError(f"plugin {name} fails with these arguments: {_reason(error)}") from None
    return options


def _explained(error: usage.UsageError | SystemExit, options: usage.Options) -> str:
    """
    What an error says, and which option may have been meant.
    """
    found = re.fullmatch(r"option --(.*) not recognized", str(error))
    known = [each.rstrip("=") for each in options.longOpt]
    hint = did_you_mean(found[1], known, lambda name: f"--{name}") if found else ""
    return f"{error}; {hint}" if hint else str(error)


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
    name: str,
    options: usage.Options,
    when_full: str,
    skip: Iterable[str] = (),
    spell: Callable[[str], str] = str,
    per: str = "connection",
) -> IService:
    """
    The service of a plugin, which `limit_service` can limit.

    :param skip: see `limit_service`.
    :param spell: how the user spells *when_full*, *skip* and *per*.
    :param per: see `limit_service`.
    :raises ValueError: if it cannot be made, or cannot be limited.
    """
    try:
        with as_if_alone(name, options, options.parent):
            service: IService = _plugin(name).makeService(options)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be made with these options: {_reason(error)}") from None
    to_limit(service, when_full, skip, name, spell, per)
    return service


def _plugin(name: str) -> Any:
    for plugin in plugins():
        if plugin.tapname == name:
            return plugin
    raise ValueError(f"there is no twistd plugin {name}")
