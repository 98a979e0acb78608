"""
The command line: ``twistd connlimit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from twisted.application.service import IProcess, IService
from twisted.python import usage

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import FIELDS, Settings, check_limits, parse, values
from connlimit._listening.checked_endpoints import client_endpoint, server_endpoint, status_endpoint
from connlimit._listening.ports import check_when_full
from connlimit._listening.service import LimitedService, limit_service, to_limit
from connlimit._twistd.config_file import DRAIN_TIMEOUT, PROCESSES, WORKER_TIMEOUT, WORKER_TIMEOUTS, read
from connlimit._twistd.options import ProgramOptions
from connlimit._twistd.processes.parent import Parent
from connlimit._twistd.processes.role import Alone
from connlimit._twistd.program import CannotStart, Program
from connlimit._twistd.reload import ConfiguredProgram, check
from connlimit._twistd.targets import demonstration
from connlimit._twistd.targets.by_name import (
    as_if_alone,
    import_factory,
    limited_plugin,
    load_application,
    plugins,
)
from connlimit._twistd.targets.relay import RelayFactory
from connlimit._twistd.targets.relay_options import RELAY_FIELDS, RelayOptions, relay_options
from connlimit._twistd.toml import ConfigError, source
from connlimit.shared.by_url import read_url, shared_limits
from connlimit.status import status_service


def _spell(setting: str) -> str:
    return "--" + setting.replace("_", "-")


# The options that go with --config.
_WITH_CONFIG = ("config", "check-config")


class _PluginOptions:
    """
    Takes the place of a plugin's options until they are parsed, with those of twistd itself as their parent.
    """

    parent: Any

    def __init__(self, plugin: Any) -> None:
        self.options: usage.Options = plugin.options()
        self._name = plugin.tapname

    def parseOptions(self, arguments: list[str]) -> None:
        """
        Parse the plugin's part of a command line.
        """
        self.parent.subOptions = self.options
        with as_if_alone(self._name, self.options, self.parent.parent):
            self.options.parseOptions(arguments)


class Options(ProgramOptions):
    """
    The options of ``twistd connlimit``.
    """

    program = "connlimit"

    synopsis = (
        "[limits] [--listen ENDPOINT]... [--forward ENDPOINT | --factory MODULE:NAME]"
        "  or  [limits] --tac FILE  or  [limits] PLUGIN [its options]"
    )
    longdesc = (
        "Serves so many connections at once and lets the others wait in line, paused. What is limited: "
        "another server (--forward), a factory (--factory), an application (--tac), or any other twistd "
        "plugin, named after the limits, with options of its own. With nothing to limit, a slow web page "
        "shows how it works."
    )
    optParameters = [
        [name.replace("_", "-"), None, None, f"{field.metadata['help']} {values(field)}"]
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
        *(
            [name.replace("_", "-"), None, f"{field.default:g}", f"{field.metadata['help']} [seconds]"]
            for name, field in RELAY_FIELDS.items()
            if field.default is not False
        ),
        [
            "shared",
            None,
            None,
            "share max-connections with all processes that give this Redis URL and this name, or take the"
            " slots of the semaphore of this name from the server at this http URL",
        ],
        [
            "shared-file",
            None,
            None,
            "the same with the URL in this file, where nobody else sees its password",
        ],
        [
            "status",
            None,
            None,
            "show a status page at this server endpoint, such as tcp:8081; on loopback unless that gives an"
            " interface",
        ],
        ["config", None, None, "take everything from this TOML file; SIGHUP reads it again"],
        [
            "processes",
            None,
            "1",
            "serve in so many processes, which share max-connections; the other limits hold in each",
        ],
        [
            "worker-timeout",
            None,
            f"{WORKER_TIMEOUT:.0f}",
            "how long one of several processes may be without an answer to its parent before it is killed and"
            " started again [seconds]",
        ],
        [
            "tac",
            None,
            None,
            "run the application of this .tac file, the limits before all that listens in it",
        ],
        ["factory", None, None, "serve with this factory, or what this callable returns, as MODULE:NAME"],
    ]

    optFlags = [
        ["check-config", None, "say what --config would do, or what is wrong with it, and exit"],
        ["log-connections", None, "tell of each connection in the log"],
        ["send-proxy", None, RELAY_FIELDS["send_proxy"].metadata["help"]],
    ]

    @property
    def subCommands(self) -> Iterator[tuple[str, None, Callable[[], _PluginOptions], str]]:
        """
        All other twistd plugins, as those that can be limited.
        """
        for plugin in plugins():
            yield plugin.tapname, None, partial(_PluginOptions, plugin), plugin.description

    def __init__(self, text: str | None = None) -> None:
        """
        :param text: that of the configuration file, if it was read already.
        """
        super().__init__()
        self["text"] = text

    def opt_skip(self, description: str) -> None:
        """
        do not limit what listens here of a plugin or --tac, such as tcp:8081; can be given several times
        """
        self.setdefault("skip", []).append(description)

    def postOptions(self) -> None:
        """
        Check everything that can be checked before anything is started.
        """
        if self["config"] is not None:
            self._read_config()
            return
        if self["check-config"]:
            raise usage.UsageError("--check-config needs --config FILE")
        texts = {name: self[name.replace("_", "-")] for name in FIELDS}
        given = {name: text for name, text in texts.items() if text is not None}
        try:
            self["drain"] = self.value("drain-timeout", DRAIN_TIMEOUT)
            check_when_full(self["when-full"], "--when-full")
            self["settings"] = parse(given, _spell)
            settings = Settings().evolve(self["settings"], _spell)
            if self["shared-file"] is not None:
                if self["shared"] is not None:
                    raise ValueError("--shared-file must be left out when --shared is given")
                self["shared"] = read_url(self["shared-file"], _spell)
            shared_limits(self["shared"], settings, _spell)  # whether it can be made
            self["processes"] = self.value("processes", PROCESSES)
            self["worker_timeout"] = self.value("worker-timeout", WORKER_TIMEOUTS)
        except ValueError as error:
            raise usage.UsageError(str(error)) from None

        targets = [f"--{name}" for name in ("forward", "factory", "tac") if self[name] is not None]
        if self.subCommand:
            targets.append(self.subCommand)
            if self["listen"]:
                raise usage.UsageError(
                    f"--listen must be left out before a plugin: {self.subCommand} listens by its own options"
                )
        if self["forward"] is None:
            for each in map(_spell, RELAY_FIELDS):
                if self[each[2:]] != self.defaults[each[2:]]:
                    raise usage.UsageError(f"{each} needs --forward, such as --forward tcp:localhost:9000")
        if len(targets) > 1:
            raise usage.UsageError(f"only one of {' and '.join(targets)} can be limited")
        if not targets:
            self["settings"].setdefault("max_connections", demonstration.MAX_CONNECTIONS)
            if not self["listen"]:
                self["listen"] = [demonstration.LISTEN]
                if self["status"] is None:
                    self["status"] = demonstration.STATUS
        elif self["tac"] is not None:
            if self["listen"]:
                raise usage.UsageError(
                    "--listen must be left out with --tac: the application listens by itself"
                )
        elif not self.subCommand and not self["listen"]:
            raise usage.UsageError(f"{targets[0]} needs --listen, such as --listen tcp:8080")

        from twisted.internet import reactor

        if self["status-host"] and self["status"] is None:
            raise usage.UsageError("--status-host needs --status, such as --status tcp:8081")
        try:
            self["endpoints"] = [server_endpoint(reactor, each) for each in self["listen"]]
            if self["forward"] is not None:
                self["backend"] = client_endpoint(reactor, self["forward"])
                self["relay"] = self._relay_options()
            if self["factory"] is not None:
                self["served"] = import_factory(self["factory"])
            self["status-endpoint"] = (
                None if self["status"] is None else status_endpoint(reactor, self["status"])
            )
            if self["tac"] is not None:
                self["application"] = load_application(self["tac"])
                to_limit(self["application"], self["when-full"], self.get("skip", ()), self["tac"], _spell)
            elif self.get("skip") and not self.subCommand:
                raise ValueError("--skip needs a plugin or --tac, of which something is to be left out")
            if targets:
                shared = {} if self["shared"] is None else {"shared": self["shared"]}
                check_limits(given | shared, _spell, "--max-connections none")
        except ValueError as error:
            raise usage.UsageError(str(error)) from None

    def _relay_options(self) -> RelayOptions:
        """
        How the relay treats its connections.
        """
        given = {name: self[name.replace("_", "-")] for name in RELAY_FIELDS}
        given["send_proxy"] = bool(given["send_proxy"])
        return relay_options(given, self["forward"], _spell)

    def _read_config(self) -> None:
        """
        Read the configuration file, and end here if it was only to be checked.
        """
        others = [
            f"--{name}"
            for name in self.defaults
            if self[name] != self.defaults[name] and name not in _WITH_CONFIG
        ]
        for name in ("listen", "skip", "status-host"):
            if self.get(name):
                others.append(f"--{name}")
        if self.subCommand:
            others.append(self.subCommand)
        if others:
            raise usage.UsageError(f"with --config, {' and '.join(others)} must be in the file")
        from twisted.internet import reactor

        path = Path(self["config"])
        try:
            if self["text"] is None:
                self["text"] = source(path)
            self["loaded"] = read(path, self["text"])
            self["parts"] = check(path, self["loaded"], reactor, self.parent)
        except ConfigError as error:
            raise CannotStart("\n".join(f"connlimit: {each}" for each in error.errors)) from None
        if self["check-config"]:
            for line in self["loaded"].summary():
                print(line)
            raise SystemExit(0)


def makeService(options: Options, role: Alone | None = None) -> Program:
    """
    The service that the options ask for.

    :param role: what this process does of it, if that is not for the options to say.
    """
    from twisted.internet import reactor

    config = None if options["config"] is None else options["loaded"]
    if role is None:
        processes = config.processes if config else options["processes"]
        timeout = config.worker_timeout if config else options["worker_timeout"]
        role = (
            Alone()
            if processes == 1
            else Parent(processes, options.arguments, reactor, timeout, options["text"], options.parent)
        )
    if config is not None:
        path, text = Path(options["config"]), options["text"]
        return ConfiguredProgram(path, config, options["parts"], reactor, role, text, options.parent)
    limiter = role.limiter(options["settings"], options["shared"])
    program = Program(options["drain"], bool(options["log-connections"]), role)
    program.add_limiter(limiter)
    where = options["status-endpoint"]
    if options.subCommand or options["tac"] is not None:
        try:
            inner = _limited(options, limiter)
        except ValueError as error:
            raise CannotStart(f"connlimit: {error}") from None
        role.plugin(inner).setServiceParent(program)
    else:
        if options["forward"] is not None:
            factory: Any = RelayFactory(options["backend"], options["forward"], options["relay"])
        elif options["factory"] is not None:
            factory = options["served"]
        else:
            factory = demonstration.site(limiter, reactor, options["status"])
            program.hints = demonstration.hints(options["listen"], options["status"])
        for endpoint in options["endpoints"]:
            LimitedService(endpoint, factory, limiter, when_full=options["when-full"]).setServiceParent(
                program
            )
    if where is not None and role.shows:
        program.status = status_service(where, role.watched(program), hosts=options["status-host"])
    return program


def _limited(options: Options, limiter: Limiter) -> IService:
    """
    The service of the plugin or of the application that the options name, behind the limiter.

    :raises ValueError: if it cannot be made, or nothing in it can be limited.
    """
    when_full, skip = options["when-full"], options.get("skip", ())
    if options.subCommand:
        return limited_plugin(options.subCommand, options.subOptions, limiter, when_full, skip, _spell)
    application = options["application"]
    limit_service(application, limiter, when_full, skip)
    # twistd looks for these in an application that it has made itself.
    process, twistd = IProcess(application, None), options.parent
    for name in ("uid", "gid"):
        if process is not None and twistd is not None and name in twistd and twistd[name] is None:  # type: ignore[redundant-expr]
            twistd[name] = getattr(process, name)
    return IService(application)
