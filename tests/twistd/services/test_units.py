"""
What is opened and closed while a program runs: whatever happens, the program goes on.
"""

from __future__ import annotations

import pytest
from pytest_twisted import ensureDeferred
from support.logs import Log
from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail

from connlimit._twistd.services.units import started, stopped


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
