"""
The command line: ``twistd connlimit``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from twisted.python import usage

from connlimit._limiter.settings import (
    FIELDS,
    LIMITS_GROUP,
    QUEUE,
    REFUSING,
    SEEING,
    Settings,
    check_limits,
    parse,
    values,
)
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
    Spelling,
    StatusConfig,
)
from connlimit._twistd.config_file import read
from connlimit._twistd.options import ProgramOptions, parameter
from connlimit._twistd.processes.parent import Parent
from connlimit._twistd.processes.role import Alone
from connlimit._twistd.program import CannotStart, Program
from connlimit._twistd.reload import ConfiguredProgram, Source
from connlimit._twistd.services.parts import Parts, check
from connlimit._twistd.targets import demonstration
from connlimit._twistd.targets.by_name import plugins
from connlimit._twistd.targets.relay_options import RELAY_FIELDS, RelayOptions, relay_options
from connlimit._twistd.toml import ConfigError, source
from connlimit.shared.by_url import read_url

_spell = Spelling().name


def _settings(group: str) -> list[str]:
    """
    The options of a group's settings.
    """
    return [name.replace("_", "-") for name, field in FIELDS.items() if field.metadata["group"] == group]


# The options that go with --config.
_WITH_CONFIG = ("config", "check-config")


class _PluginArguments:
    """
    Takes what stands behind the name of a plugin, which is the plugin's own.
    """

    parent: Any

    def __init__(self) -> None:
        self.arguments: list[str] = []

    def parseOptions(self, arguments: list[str]) -> None:
        """
        Keep them.
        """
        self.arguments = arguments


class Options(ProgramOptions):
    """
    The options of ``twistd connlimit``.

    :ivar described: what they describe.
    :ivar source: where they have it from.
    :ivar parts: what its services are made of.
    :ivar text: the text of the file that they name, if they name one.
    """

    program = "connlimit"

    source: Source
    described: Config
    parts: dict[str, Parts]

    synopsis = "[options] [PLUGIN [its options]]"
    longdesc = (
        "Serves a limited number of connections at once; the others wait in a queue, paused. What it limits"
        " is another server (--forward), a factory (--factory), an application (--tac), or another twistd"
        " plugin, whose name and options follow those of connlimit. Without any of these, a slow web page"
        " shows how it works. Times are numbers of seconds, or texts such as 500ms, 30s, 5min or 2h."
    )
    optParameters = [
        *(
            parameter(
                name.replace("_", "-"), field.metadata["help"], values(field)[0], None, values(field)[1]
            )
            for name, field in FIELDS.items()
        ),
        parameter(
            "per",
            "what takes a slot: each connection, or each request of a web server",
            "connection or request",
            "connection",
        ),
        parameter(
            "when-full",
            "what a port does when nobody more can be served or wait",
            "refuse or stop-accepting",
            "refuse",
        ),
        parameter(
            "drain-timeout",
            "how long served connections may take to end when the program is stopped",
            "seconds",
            "0",
        ),
        parameter("forward", "relay to the server at this client endpoint, such as tcp:localhost:9000"),
        *(
            parameter(
                name.replace("_", "-"),
                f"with --forward: {field.metadata['help']}",
                "seconds",
                f"{field.default:g}",
            )
            for name, field in RELAY_FIELDS.items()
            if field.default is not False
        ),
        parameter(
            "shared",
            "share max-connections with all processes that give this Redis URL and the same name, or take"
            " slots of the semaphore of that name from the server at this http URL",
        ),
        parameter("shared-file", "the same with the URL in this file, where nobody else sees its password"),
        parameter(
            "status",
            "serve a status page at this server endpoint, such as tcp:8081; on loopback unless it gives an"
            " interface",
        ),
        parameter("config", "take everything from this TOML file; SIGHUP reads it again"),
        parameter(
            "processes",
            "serve in this number of worker processes, which share max-connections; the other limits hold in"
            " each",
            "processes",
            "1",
        ),
        parameter(
            "worker-timeout",
            "how long a worker may give no answer before it is killed and replaced",
            "seconds",
            f"{WORKER_TIMEOUT:.0f}",
        ),
        parameter("tac", "run the application of this .tac file, and limit all that listens in it"),
        parameter("factory", "serve with this factory, or what this callable returns, as MODULE:NAME"),
    ]

    optFlags = [
        ["check-config", None, "say what --config would do, or what is wrong with it, and exit"],
        ["log-connections", None, "log every connection, at the level debug"],
        ["send-proxy", None, f"with --forward: {RELAY_FIELDS['send_proxy'].metadata['help']}"],
    ]

    groups = {
        "What is limited": ["listen", "forward", "factory", "tac", "skip", "config", "check-config"],
        LIMITS_GROUP: [*_settings(LIMITS_GROUP), "per", "shared", "shared-file"],
        QUEUE: _settings(QUEUE),
        REFUSING: [*_settings(REFUSING), "when-full"],
        "Stopping": ["drain-timeout"],
        SEEING: [*_settings(SEEING), "log-connections", "status", "status-host"],
        "Relay": [name.replace("_", "-") for name in RELAY_FIELDS],
        "Processes": ["processes", "worker-timeout"],
        "Program": ["help", "version"],
    }

    examples = [
        "twistd -n connlimit --listen tcp:8080 --forward tcp:localhost:9000 \\",
        "    --max-connections 100 --max-waiting 1000 --wait-timeout 30s",
        "twistd -n connlimit --max-connections 100 web --listen tcp:8080 --path .",
        "twistd -n connlimit --config connlimit.toml",
    ]

    @property
    def subCommands(self) -> Iterator[tuple[str, None, type[_PluginArguments], str]]:
        """
        All other twistd plugins, as those that can be limited.
        """
        for plugin in plugins():
            yield plugin.tapname, None, _PluginArguments, plugin.description

    def __init__(self, text: str | None = None) -> None:
        """
        :param text: that of the file that was read already by another process.
        """
        super().__init__()
        self.text = text

    def opt_skip(self, description: str) -> None:
        """
        do not limit what listens here of a plugin or --tac, such as tcp:8081; can be given several times
        """
        self.setdefault("skip", []).append(description)

    def postOptions(self) -> None:
        """
        Make a `Config` of what was said, and check everything that the start will need.
        """
        from twisted.internet import reactor

        if self["config"] is not None:
            self.source, self.described = self._from_file(Path(self["config"]))
        else:
            if self["check-config"]:
                raise usage.UsageError("--check-config needs --config FILE")
            try:
                self.described = self._config()
            except ValueError as error:
                raise usage.UsageError(str(error)) from None
            described = self.described
            self.source = Source(Spelling(), self.text, lambda text: described)
        try:
            self.parts = check(self.described, self.source.spelling, reactor, self.parent)
            if self["config"] is None:
                self._check_limits()
        except ConfigError as error:
            if self["config"] is None:
                raise usage.UsageError(error.errors[0]) from None
            raise _cannot_start(error) from None
        if self["check-config"]:
            for line in self.described.summary():
                print(line)
            raise SystemExit(0)

    def _config(self) -> Config:
        """
        What the command line describes: one limiter and one service.

        :raises ValueError: if it describes nothing.
        """
        drain_timeout = self.value("drain-timeout", DRAIN_TIMEOUT)
        when_full = WHEN_FULL.of_text("--when-full", self["when-full"])
        per = PER.of_text("--per", self["per"])
        settings = Settings().evolve(parse(self._given(), _spell), _spell)
        if self["shared-file"] is not None:
            if self["shared"] is not None:
                raise ValueError("--shared-file must be left out when --shared is given")
            self["shared"] = self.text = read_url(self["shared-file"], _spell, self.text)
        processes = self.value("processes", PROCESSES)
        worker_timeout = self.value("worker-timeout", WORKER_TIMEOUTS)
        targets = self._targets()
        if not targets:
            if settings.max_connections is None and "max_connections" not in self._given():
                settings = settings.evolve({"max_connections": demonstration.MAX_CONNECTIONS})
            if not self["listen"]:
                self["listen"] = [demonstration.LISTEN]
                if self["status"] is None:
                    self["status"] = demonstration.STATUS
        if self["status-host"] and self["status"] is None:
            raise ValueError("--status-host needs --status, such as --status tcp:8081")
        if self.get("skip") and not self.subCommand and self["tac"] is None:
            raise ValueError("--skip needs a plugin or --tac, of which something is to be left out")
        service = ServiceConfig(
            name=targets[0].lstrip("-") if targets else "demonstration",
            limiter=settings.name,
            listen=tuple(self["listen"]),
            forward=self["forward"],
            factory=self["factory"],
            plugin=(self.subCommand, *self.subOptions.arguments) if self.subCommand else (),
            when_full=when_full,
            relay=RelayOptions() if self["forward"] is None else self._relay_options(),
            tac=self["tac"],
            skip=tuple(self.get("skip", ())),
            per=per,
        )
        status = None
        if self["status"] is not None:
            status = StatusConfig(self["status"], hosts=tuple(self["status-host"]))
        return Config(
            {settings.name: LimiterConfig(settings, self["shared"])},
            {service.name: service},
            status,
            drain_timeout,
            bool(self["log-connections"]),
            processes,
            worker_timeout,
        )

    def _given(self) -> dict[str, str]:
        """
        The texts of those settings that were given.
        """
        texts = {name: self[name.replace("_", "-")] for name in FIELDS}
        return {name: text for name, text in texts.items() if text is not None}

    def _targets(self) -> list[str]:
        """
        What is to be limited, which is one thing or nothing.

        :raises ValueError: if it is several, or something else that was given does not go with it.
        """
        targets = [f"--{name}" for name in ("forward", "factory", "tac") if self[name] is not None]
        if self.subCommand:
            targets.append(self.subCommand)
            if self["listen"]:
                raise ValueError(
                    f"--listen must be left out before a plugin: {self.subCommand} listens by its own options"
                )
        if self["forward"] is None:
            for each in map(_spell, RELAY_FIELDS):
                if self[each[2:]] != self.defaults[each[2:]]:
                    raise ValueError(f"{each} needs --forward, such as --forward tcp:localhost:9000")
        if len(targets) > 1:
            raise ValueError(f"only one of {' and '.join(targets)} can be limited")
        if self["tac"] is not None and self["listen"]:
            raise ValueError("--listen must be left out with --tac: the application listens by itself")
        if targets and targets[0] in ("--forward", "--factory") and not self["listen"]:
            raise ValueError(f"{targets[0]} needs --listen, such as --listen tcp:8080")
        return targets

    def _check_limits(self) -> None:
        """
        See to it that something is limited, unless this only shows how it works.
        """
        given: list[str] = [*self._given(), *(["shared"] if self["shared"] is not None else [])]
        if not self._targets():
            return
        try:
            check_limits(given, _spell, "--max-connections none")
        except ValueError as error:
            raise ConfigError([str(error)]) from None

    def _relay_options(self) -> RelayOptions:
        """
        How the relay treats its connections.
        """
        given = {name: self[name.replace("_", "-")] for name in RELAY_FIELDS}
        given["send_proxy"] = bool(given["send_proxy"])
        return relay_options(given, self["forward"], _spell)

    def _from_file(self, path: Path) -> tuple[Source, Config]:
        """
        What the configuration file describes.
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
        try:
            if self.text is None:
                self.text = source(path)
            return Source(Spelling(path), self.text, partial(read, path)), read(path, self.text)
        except ConfigError as error:
            raise _cannot_start(error) from None


def _cannot_start(error: ConfigError) -> CannotStart:
    return CannotStart("\n".join(f"connlimit: {each}" for each in error.errors))


def makeService(options: Options, role: Alone | None = None) -> Program:
    """
    The program that the options describe.

    :param role: what this process does of it, if that is not for the options to say.
    """
    from twisted.internet import reactor

    config = options.described
    if role is None:
        role = Alone()
        if config.processes > 1:
            role = Parent(
                config.processes,
                options.arguments,
                reactor,
                config.worker_timeout,
                options.text,
                options.parent,
            )
    try:
        return ConfiguredProgram(config, options.parts, options.source, reactor, role, options.parent)
    except ValueError as error:
        raise CannotStart(f"connlimit: {error}") from None
