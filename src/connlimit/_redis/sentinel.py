"""
Finds the primary of a Redis service by its sentinels.

txredisapi has a ``Sentinel`` of its own, of which this uses nothing, since that

- drops what the sentinels answer: a password that they refuse, or a service that they do not know, is ten
  seconds of silence each time, and then "No master found" without a reason;
- gives up for good a sentinel that refuses the password, and otherwise keeps a connection to every sentinel,
  which it makes again without end, whether anything is asked or not;
- hands out pools of its own, not an endpoint, so that what `connlimit._redis.client` sees to (bounds,
  deadlines, reasons) would be lost with the primary, too;
- counts its time by the reactor's clock, which can be set back or forth.

As that does, this speaks plain TCP, to the sentinels and to the primary.
"""

from __future__ import annotations

from typing import Any

import attrs
import txredisapi  # type: ignore[import-untyped]
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from zope.interface import implementer

from connlimit._redis.client import connect, describe
from connlimit._system.clock import clock_of

#: Seconds in which a sentinel must answer, so that the others are not asked too late.
_PATIENCE = 0.4


@implementer(IStreamClientEndpoint)
@attrs.define
class SentinelEndpoint:
    """
    Connects to whatever Redis the sentinels say is the primary, and asks them again for each connection.

    Each connection begins with another sentinel, so that one that is away, or does not know yet of a
    failover, is a delay and no more.
    """

    reactor: Any
    sentinels: tuple[tuple[str, int], ...]
    service: str
    timeout: float
    username: str | None = None
    password: str | None = attrs.field(default=None, repr=False)
    _first: int = 0

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        order = self.sentinels[self._first :] + self.sentinels[: self._first]
        self._first = (self._first + 1) % len(self.sentinels)
        why = ""
        for host, port in order:
            try:
                found = await self._ask(host, port)
            except CancelledError:
                raise
            except Exception as error:
                why = f"sentinel {host}:{port}: {describe(error)}"
                continue
            primary = HostnameEndpoint(self.reactor, *found, timeout=self.timeout)
            connected: IProtocol = await primary.connect(factory)
            return connected
        raise txredisapi.ConnectionError(why)

    async def _ask(self, host: str, port: int) -> tuple[str, int]:
        asked = Deferred.fromCoroutine(self._found(HostnameEndpoint(self.reactor, host, port)))
        return await asked.addTimeout(_PATIENCE, clock_of(self.reactor))

    async def _found(self, endpoint: IStreamClientEndpoint) -> tuple[str, int]:
        sentinel = await connect(endpoint, username=self.username, password=self.password)
        try:
            answer = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        finally:
            sentinel.transport.abortConnection()
        if not isinstance(answer, list) or len(answer) != 2 or not isinstance(answer[1], int):
            raise ValueError(f"it knows no service {self.service!r}")
        return str(answer[0]), answer[1]
