"""
The command line: ``twistd connlimit-semaphores``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.python import usage

from connlimit._limiter.values import COUNT_ABOVE_ZERO, duration
from connlimit._listening.checked_endpoints import server_endpoint, status_endpoint
from connlimit._system import descriptors
from connlimit._system.clock import clock_of
from connlimit._twistd.options import ProgramOptions, parameter
from connlimit._twistd.program import CannotStart, Program
from connlimit._twistd.semaphores.config_file import read
from connlimit._twistd.toml import ConfigError
from connlimit.semaphores.server.state import MAX_PEERS, State
from connlimit.semaphores.server.store import IStore, MemoryStore
from connlimit.shared.by_url import renamed
from connlimit.status import status_service

#: Where it listens if nothing is said.
LISTEN = "tcp:8000:interface=127.0.0.1"

#: The file that is read if none is named; it may be missing.
_CONFIG = "throttle.toml"


class Options(ProgramOptions):
    """
    The options of ``twistd connlimit-semaphores``.
    """

    program = "connlimit-semaphores"

    synopsis = "[options]"
    longdesc = (
        "Serves named semaphores over HTTP, to clients of Throttle in any language: each job takes a lock,"
        " and waits in a queue when too little is left. Everything is kept in memory, unless there is a"
        " --store. Times are numbers of seconds, or texts such as 500ms, 30s, 5min or 2h."
    )
    optParameters = [
        parameter(
            "config",
            "the semaphores, as a TOML file, which must exist; SIGHUP reads it again",
            shown=f"{_CONFIG}, if there is one",
        ),
        parameter(
            "grace",
            "for this time after the start, grant locks only to those who held them before",
            "seconds",
            "0",
        ),
        parameter("store", "keep the state in the Redis at this URL, which several servers can share"),
        parameter(
            "max-peers",
            "how many peers there can be at once",
            "peers",
            shown=f"{MAX_PEERS}, or as many as the store says",
        ),
        parameter(
            "max-per-peer",
            "how many connections one address can have at once",
            "connections",
            shown="half of all that there can be",
        ),
        parameter(
            "drain-timeout",
            "how long requests may still wait for their locks when the program is stopped",
            "seconds",
            "30",
        ),
        parameter(
            "status",
            "serve a status page at this server endpoint, such as tcp:8081; on loopback unless it gives an"
            " interface",
        ),
    ]

    groups = {
        "What is served": ["listen", "config", "store"],
        "Limits": ["max-peers", "max-per-peer"],
        "Starting and stopping": ["grace", "drain-timeout"],
        "Seeing": ["status", "status-host"],
        "Program": ["help", "version"],
    }

    examples = [
        "twistd -n connlimit-semaphores --listen tcp:8000:interface=127.0.0.1 \\",
        "    --config throttle.toml --status tcp:8081",
    ]

    def opt_listen(self, description: str) -> None:
        """
        listen at this server endpoint; can be given several times [default: tcp:8000:interface=127.0.0.1]
        """
        super().opt_listen(description)

    def postOptions(self) -> None:
        """
        Check everything that can be checked before anything is started.
        """
        from twisted.internet import reactor

        if self["status-host"] and not self["status"]:
            raise usage.UsageError("--status-host needs --status, such as --status tcp:8081")
        for name in ("grace", "drain-timeout"):
            self[f"{name}-seconds"] = self.value(name, duration())
        for name in ("max-peers", "max-per-peer"):
            self[f"{name}-count"] = None if self[name] is None else self.value(name, COUNT_ABOVE_ZERO)
        if self["store"] and self["grace-seconds"]:
            raise usage.UsageError("--grace must be left out with --store, which forgets nobody")
        is_named = self["config"] is not None
        self["path"] = Path(self["config"] if is_named else _CONFIG)
        try:
            self["semaphores"] = read(self["path"]) if is_named or self["path"].exists() else None
            if self["store"] and self["max-peers"] and self["semaphores"] is None:
                raise usage.UsageError(
                    "--max-peers must be left out with --store and no file, which change nothing"
                )
            self["endpoints"] = [server_endpoint(reactor, each) for each in self["listen"] or [LISTEN]]
            self["status-endpoint"] = status_endpoint(reactor, self["status"]) if self["status"] else None
            self["kept"] = _store(self["store"], State(), reactor)
            _demand_httptools()
        except ConfigError as error:
            raise CannotStart("\n".join(f"connlimit-semaphores: {each}" for each in error.errors)) from None
        except ValueError as error:
            raise usage.UsageError(str(error)) from None


def _demand_httptools() -> None:
    """
    :raises ValueError: if what reads requests is not installed.
    """
    try:
        import httptools  # noqa: F401
    except ImportError:
        raise ValueError(
            "connlimit-semaphores needs httptools: pip install 'connlimit[semaphores]'"
        ) from None


def _store(url: str | None, state: State, reactor: Any) -> IStore:
    """
    :raises ValueError: if the URL is wrong, or what it takes is not installed.
    """
    if url is None:
        return MemoryStore(state, clock_of(reactor))
    try:
        from connlimit.semaphores.server.redis_store import RedisStore
    except ImportError:
        raise ValueError("--store needs txredisapi: pip install 'connlimit[redis]'") from None
    try:
        store: IStore = RedisStore(state, url, reactor)
    except ValueError as error:
        raise ValueError(renamed(error, "--store")) from None
    return store


def makeService(options: Options) -> Program:
    """
    The service that the options ask for.
    """
    from twisted.internet import reactor

    # This needs an extra, and --help does not.
    from connlimit._twistd.semaphores.program import SemaphoreProgram

    descriptors.raise_limit()
    config = options["semaphores"]
    program = SemaphoreProgram(
        options["path"],
        {} if config is None and options["store"] is None else config,
        options["endpoints"],
        options["kept"],
        reactor,
        max_peers=options["max-peers-count"],
        max_per_peer=options["max-per-peer-count"],
        grace=options["grace-seconds"],
        polls_timeout=options["drain-timeout-seconds"],
    )
    if config is None:
        there_are = "there are no semaphores" if options["store"] is None else "they are those of the store"
        program.hints = (f"{options['path']}: there is no such file, so {there_are}",)
    if options["status-endpoint"] is not None:
        program.status = status_service(options["status-endpoint"], program, hosts=options["status-host"])
    return program
