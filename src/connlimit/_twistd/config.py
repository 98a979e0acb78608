"""
What a program runs: its limiters, services and status page, whether a command line or a file has said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from connlimit._limiter.settings import Settings
from connlimit._limiter.values import duration, shown, whole_number
from connlimit._twistd.targets.relay_options import RelayOptions

#: How many processes can serve; more are a slip.
MAX_PROCESSES = 1024
PROCESSES = whole_number(1, MAX_PROCESSES)

#: How long the connections that are served may take to end.
DRAIN_TIMEOUT = duration()

#: How long a worker may be without an answer, and seconds for which it may unless something else is said.
WORKER_TIMEOUTS = duration(1)
WORKER_TIMEOUT = 60.0


@attrs.frozen
class Spelling:
    """
    What things are called where they were said: keys of a file, or options.

    :ivar file: the file; None for a command line.
    """

    file: Path | None = None

    def name(self, key: str) -> str:
        """
        What a setting or a key is called.
        """
        return key if self.file is not None else "--" + key.replace("_", "-")

    def where(self, *table: str) -> str:
        """
        How a sentence begins on what stands in a table of the file.
        """
        return "" if self.file is None else f"{self.file}: [{'.'.join(table)}] "


@attrs.frozen
class LimiterConfig:
    """
    What one limiter does.

    :ivar settings: its settings.
    :ivar shared: the URL by which all that give the same and its name share the limit, or None.
    """

    settings: Settings
    shared: str | None = None


@attrs.frozen
class ServiceConfig:
    """
    What one service listens at, what it serves with, and whose limits hold. One that is told nothing of what
    to serve with shows a page on how it works.

    :ivar name: its name.
    :ivar limiter: the name of its limiter; may be left out if there is one only.
    :ivar listen: an endpoint string or several.
    :ivar forward: the endpoint string of another server.
    :ivar relay: how the relay to it treats its connections.
    :ivar factory: MODULE:NAME of a factory, or of a callable that returns one.
    :ivar plugin: a twistd plugin's name and its arguments.
    :ivar tac: the path of a ``.tac`` file, whose application is run.
    :ivar skip: what of a plugin or an application is left without limits, by the endpoints it listens at.
    :ivar when_full: what its ports do when its limiter is full, ``refuse`` or ``stop-accepting``.
    :ivar per: what takes a slot, ``connection`` or ``request``.
    """

    name: str
    limiter: str
    listen: tuple[str, ...] = ()
    forward: str | None = None
    factory: str | None = None
    plugin: tuple[str, ...] = ()
    when_full: str = "refuse"
    relay: RelayOptions = RelayOptions()
    tac: str | None = None
    skip: tuple[str, ...] = ()
    per: str = "connection"


@attrs.frozen
class StatusConfig:
    """
    Where the status page is, and what it shows.

    :ivar listen: the endpoint string of the status page.
    :ivar show_peers: whether others than loopback see the addresses of peers.
    :ivar hosts: names, besides IP addresses and localhost, by which browsers may ask for it.
    """

    listen: str
    show_peers: bool = False
    hosts: tuple[str, ...] = ()


@attrs.frozen
class Config:
    """
    All that a program runs.

    :ivar limiters: the limiters by their names.
    :ivar services: the services by their names.
    :ivar status: the status page, or None.
    :ivar drain_timeout: seconds that connections may take to end when the program is stopped.
    :ivar log_connections: whether every connection is logged, from the next start on.
    :ivar processes: how many processes serve, from the next start on.
    :ivar worker_timeout: seconds after which one of them that does not answer is killed.
    """

    limiters: Mapping[str, LimiterConfig]
    services: Mapping[str, ServiceConfig]
    status: StatusConfig | None = None
    drain_timeout: float = 0.0
    log_connections: bool = False
    processes: int = 1
    worker_timeout: float = WORKER_TIMEOUT

    def summary(self) -> list[str]:
        """
        What the program would do, a line each.
        """
        lines = [
            f"limiter {name}: "
            + (
                ", ".join(f"{k}={shown(v)}" for k, v in limiter.settings.changed().items() if k != "name")
                or "no limits"
            )
            for name, limiter in self.limiters.items()
        ]
        for service in self.services.values():
            does = (
                f"forwards to {service.forward}{' with a PROXY header' if service.relay.send_proxy else ''}"
                if service.forward
                else f"serves with {service.factory}"
                if service.factory
                else f"runs {service.tac or ' '.join(service.plugin)}"
                if service.tac or service.plugin
                else "shows how it works"
            )
            where = f"listens at {', '.join(service.listen)}, " if service.listen else ""
            per = ", per request" if service.per == "request" else ""
            lines.append(f"service {service.name}: {where}{does}, behind limiter {service.limiter}{per}")
        if self.processes > 1:
            lines.append(f"processes: {self.processes}")
        if self.status:
            lines.append(f"status page: listens at {self.status.listen}")
        return lines
