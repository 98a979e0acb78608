"""
What is opened and closed while a program runs: whatever happens, the program goes on.
"""

from __future__ import annotations

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import RecordingFactory
from support.logs import Log
from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IStreamServerEndpoint
from zope.interface import implementer

from connlimit import Limiter
from connlimit._twistd.config import ServiceConfig
from connlimit._twistd.processes.role import Alone
from connlimit._twistd.services.parts import Parts
from connlimit._twistd.services.units import PluginUnit, ServiceUnit, started, stopped


@ensureDeferred
async def test_a_service_that_does_not_stop_is_not_waited_for_for_ever() -> None:
    never: Deferred[None] = Deferred()
    with Log() as log:
        await stopped("service slow", lambda: never, 0.01)
        never.callback(None)  # too late to matter
    assert log.texts() == ["service slow has not stopped within 0 s"]


@ensureDeferred
async def test_a_service_that_fails_to_stop_is_logged() -> None:
    with Log() as log:
        await stopped("service bad", lambda: fail(ValueError("no")))
    assert log.texts() == ["service bad did not stop as it should"]


def test_a_service_that_fails_to_start_is_stopped_again() -> None:
    class Failing(Service):
        is_stopped = False

        def startService(self) -> None:
            raise ValueError("no")

        def stopService(self) -> None:
            self.is_stopped = True

    service = Failing()
    with pytest.raises(ValueError, match="no"):
        started(service, service.startService)
    assert service.is_stopped


@implementer(IStreamServerEndpoint)
class Later:
    """
    An endpoint that listens when it is told to.
    """

    def __init__(self) -> None:
        self.listening: Deferred[object] = Deferred(lambda deferred: None)

    def listen(self, factory: object) -> Deferred[object]:
        return self.listening


class Port:
    """
    A port that knows whether it was stopped.
    """

    is_stopped = False

    def stopListening(self) -> None:
        self.is_stopped = True


def later_unit() -> tuple[ServiceUnit, Later]:
    endpoint = Later()
    config = ServiceConfig("late", "default", ("later",), factory="m:f")
    parts = Parts(config, {"later": endpoint}, lambda limiter: RecordingFactory())
    unit = ServiceUnit(parts, Limiter(1), Alone())
    unit.open("later")
    return unit, endpoint


@ensureDeferred
async def test_an_endpoint_may_listen_later() -> None:
    unit, endpoint = later_unit()
    assert unit.opened() == ["later"]
    assert not unit.may_be_at("later", 80)
    port = Port()
    endpoint.listening.callback(port)
    await unit.close("later")
    assert (unit.opened(), port.is_stopped) == ([], True)


@ensureDeferred
async def test_an_endpoint_that_does_not_listen_yet_is_given_up_when_its_service_is_closed() -> None:
    unit, endpoint = later_unit()
    with Log() as log:
        await unit.close("later")
    assert (unit.opened(), log.texts()) == ([], [])
    assert endpoint.listening.called


def test_an_endpoint_that_fails_later_is_logged() -> None:
    unit, endpoint = later_unit()
    with Log() as log:
        endpoint.listening.errback(OSError("no"))
    assert log.texts() == ["service late does not listen at later"]
    assert unit.opened() == ["later"]


class Noting(Service):
    """
    A service that notes how it is started.
    """

    def __init__(self) -> None:
        self.started: list[str] = []

    def privilegedStartService(self) -> None:
        self.started.append("privileged")

    def startService(self) -> None:
        self.started.append("started")


@pytest.mark.parametrize("has_privileges", [True, False])
def test_a_plugin_starts_the_rest_when_the_privileges_are_given_up(has_privileges: bool) -> None:
    service = Noting()
    config = ServiceConfig("plugin", "default", plugin=("noting",))
    unit = PluginUnit(Parts(config, {}, None, lambda limiter: service), Limiter(1), Alone(), has_privileges)
    unit.open("noting")
    assert service.started == (["privileged"] if has_privileges else ["privileged", "started"])
    if has_privileges:
        unit.start()
        assert service.started == ["privileged", "started"]
    assert unit.opened() == ["noting"]
