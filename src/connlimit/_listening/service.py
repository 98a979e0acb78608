"""
Listening behind a limiter: as a service that drains when it is stopped, and as any service of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from twisted.application.internet import SSLServer, StreamServerEndpointService, TCPServer, UNIXServer
from twisted.application.service import IService, IServiceCollection
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IProtocolFactory, IStreamServerEndpoint

from connlimit._connection.factory import LimitingFactory
from connlimit._limiter.limiter import Limiter
from connlimit._limiter.values import duration
from connlimit._listening.checked_endpoints import server_endpoint
from connlimit._listening.endpoint import LimitingEndpoint, check_per, limited
from connlimit._listening.places import place_of, place_of_service
from connlimit._listening.ports import WatchedEndpoint, check_when_full
from connlimit._request.factory import RequestLimitingFactory, check_requests

#: How long active connections may take to end.
DRAIN_TIMEOUT = duration().or_none("")


class LimitedService(StreamServerEndpointService):
    """
    A service that listens on an endpoint behind a limiter.

    If it cannot listen, it does not start: the error is raised by ``startService``. When it is stopped,
    it refuses those who wait for it, stops listening, and waits until all who were refused have been told.
    With a *drain_timeout* it then lets the active connections finish, and closes what is left when that time
    is over; the limiter's connections to other services are left alone.
    """

    factory: LimitingFactory | RequestLimitingFactory

    def __init__(
        self,
        endpoint: IStreamServerEndpoint,
        factory: IProtocolFactory,
        limiter: Limiter,
        drain_timeout: float | None = None,
        when_full: str = "refuse",
        per: str = "connection",
    ) -> None:
        """
        :param endpoint: where to listen.
        :param factory: serves the connections.
        :param limiter: says how many at once.
        :param drain_timeout: seconds that active connections may take when the service is stopped;
            None does not wait for them, and leaves them open, as Twisted does.
        :param when_full: see `LimitingEndpoint`.
        :param per: see `LimitingEndpoint`.
        :raises TypeError: for a *drain_timeout*, *when_full* or *per* of a wrong type, or for a factory that
            makes no requests if these are to be limited.
        :raises ValueError: for a wrong one.
        """
        DRAIN_TIMEOUT.of_code("drain_timeout", drain_timeout)
        check_per(per)
        super().__init__(WatchedEndpoint(endpoint, limiter, when_full), limited(factory, limiter, per))
        self.drain_timeout = drain_timeout

    def privilegedStartService(self) -> None:
        """
        Start to listen, or raise the reason why that is impossible.
        """
        # The flag by which strports.service makes a failure to listen a failure to start.
        self._raiseSynchronously = True
        super().privilegedStartService()

    def stopService(self) -> Deferred[Any]:
        """
        Stop listening, and drain.

        :return: fires when that is done.
        """
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        admission = self.factory.admission
        # Before anything else of it stops; from the next call on nobody comes any more.
        admission.refuse_waiting(admission.waiting_for(self.factory))
        await super().stopService()
        active = [] if self.drain_timeout is None else admission.active_for(self.factory)
        await admission.wait_for(active, self.drain_timeout)


def limit_service(
    service: Any,
    limiter: Limiter,
    when_full: str = "refuse",
    skip: Iterable[str] = (),
    per: str = "connection",
) -> list[IService]:
    """
    Put a limiter before every factory that listens in a tree of services, by whatever it was made.

    :param service: a service that was not started yet, or an application.
    :param limiter: the limiter; all of them share it.
    :param when_full: see `LimitingEndpoint`.
    :param skip: where not to: endpoint strings such as ``tcp:8081``, which stands for any interface.
    :param per: see `LimitingEndpoint`.
    :return: the services that are limited now.
    :raises ValueError: if nothing is left to limit, it listens already, nothing listens at one of *skip*,
        it is behind this limiter already, *when_full* asks too much of what listens without an endpoint, or
        requests are to be limited and one makes none; nothing has changed then.
    """
    found = to_limit(service, when_full, skip, per=per)
    for each in found:
        if limiter in (getattr(_factory(each), "limiter", None), _limiter_of(each)):
            raise ValueError(
                f"{each} listens behind this limiter already, so a connection would need two of its slots"
            )
    for each in found:
        _limit(each, limiter, when_full, per)
    return found


def to_limit(
    service: Any,
    when_full: str,
    skip: Iterable[str],
    called: str = "this",
    spell: Callable[[str], str] = str,
    per: str = "connection",
) -> list[Any]:
    """
    The services that `limit_service` limits.

    :param called: what the whole is called.
    :param spell: how the user spells *when_full*, *skip* and *per*.
    :raises ValueError: as `limit_service` does.
    """
    check_when_full(when_full, spell("when_full"))
    check_per(per, spell("per"))
    found = list(listening_services(IService(service)))
    if not found:
        raise ValueError(f"{called} has no service that listens, so there is nothing to limit")
    for description in skip:
        found = _without(found, description, spell("skip"))
    if not found:
        raise ValueError(f"{spell('skip')} leaves nothing of {called} to limit")
    for each in found:
        if each.running:
            raise ValueError(f"{each} listens already; it must be limited before it is started")
        if when_full != "refuse" and not isinstance(each, StreamServerEndpointService):
            raise ValueError(
                f"{spell('when_full')} must be refuse, not {when_full}, for {called}, "
                "which listens without endpoints"
            )
        if per == "request":
            check_factory(_factory(each), spell("per"))
    return found


def check_factory(factory: Any, name: str) -> None:
    """
    Check that requests of a factory can be limited.

    :param name: what asks for that.
    :raises ValueError: if it makes none.
    """
    try:
        check_requests(factory)
    except TypeError as error:
        raise ValueError(f"{name} must be connection, not request: {error}") from None


def listening_services(service: IService) -> Iterator[Any]:
    """
    The services that listen, in a tree of services.
    """
    if isinstance(service, (StreamServerEndpointService, TCPServer, SSLServer, UNIXServer)):
        yield service
    for each in IServiceCollection(service, ()):
        yield from listening_services(each)


def _without(services: list[Any], description: str, name: str) -> list[Any]:
    """
    Those services that do not listen where the description says.
    """
    from twisted.internet import reactor

    skipped = place_of(server_endpoint(reactor, description, name))
    places = [place_of_service(each) for each in services]
    left = [
        each for each, place in zip(services, places, strict=True) if skipped is None or place not in skipped
    ]
    if len(left) == len(services):
        where = ", ".join(str(place) for place in places if place is not None) or "nowhere that is known"
        raise ValueError(f"{name} must say where something listens ({where}), not {description!r}")
    return left


def _factory(service: Any) -> Any:
    """
    The factory of a service that listens.
    """
    if isinstance(service, StreamServerEndpointService):
        return service.factory
    # It is the second of the arguments of listenTCP and its like.
    return service.kwargs["factory"] if "factory" in service.kwargs else service.args[1]


def _limiter_of(service: Any) -> Limiter | None:
    """
    The limiter of the endpoint of a service, if it has one.
    """
    endpoint = getattr(service, "endpoint", None)
    return endpoint.limiter if isinstance(endpoint, LimitingEndpoint) else None


def _limit(service: Any, limiter: Limiter, when_full: str, per: str) -> None:
    factory = limited(_factory(service), limiter, per)
    if isinstance(service, StreamServerEndpointService):
        # If it cannot listen it does not start, as one of strports.service.
        service._raiseSynchronously = True
        service.factory = factory
        service.endpoint = WatchedEndpoint(service.endpoint, limiter, when_full)
    elif "factory" in service.kwargs:
        service.kwargs["factory"] = factory
    else:
        where, _, *rest = service.args
        service.args = (where, factory, *rest)
