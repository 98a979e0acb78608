"""
Observers come and go, and hear what happens.
"""

from __future__ import annotations

from support.limiters import LimiterTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from connlimit.interfaces import ILimiterObserver
from connlimit.observers import LimiterObserver


@implementer(ILimiterObserver)
class Recorder:
    """
    Writes down what an observer is told.
    """

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def __getattr__(self, event: str) -> object:
        return lambda limiter, *facts: self.told.append((event, *facts))


class ObserverTests(LimiterTestCase):
    """
    Observers hear everything and harm nothing.
    """

    def test_every_event_is_told(self) -> None:
        recorder = Recorder()
        self.limited(1, max_waiting=2, wait_timeout=5, observers=[recorder])
        first, _, third, _ = self.connect(4)
        self.clock.advance(1)
        self.close(first)
        third.abortConnection()
        self.turn()
        self.connect()
        self.clock.advance(5)
        self.turn()
        self.limiter.reconfigure(max_connections=3, max_waiting=2)
        ports = [
            tuple(fact.address.port - 10000 if hasattr(fact, "address") else fact for fact in told)
            for told in recorder.told
        ]
        self.assertEqual(
            ports,
            [
                ("served", 0, 0.0),
                ("waiting", 1),
                ("waiting", 2),
                ("refused", 3, "full"),
                ("finished", 0),
                ("served", 1, 1.0),
                ("departed", 2, 1.0),
                ("waiting", 4),
                ("refused", 4, "timeout"),
                ("reconfigured", {"max_connections": (1, 3)}),
            ],
        )

    def test_an_observer_that_raises_is_logged_and_changes_nothing(self) -> None:
        class Broken(LimiterObserver):
            def __getattribute__(self, name: str) -> object:
                raise ZeroDivisionError(name)

        recorder = Recorder()
        self.limited(1, observers=[Broken(), recorder])
        first, _ = self.connect(2)
        self.close(first)
        self.assertEqual(self.served(), [0, 1])
        self.assertEqual([event for event, *_ in recorder.told], ["served", "waiting", "finished", "served"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_observers_come_and_go(self) -> None:
        self.limited()
        recorder = Recorder()
        self.limiter.add_observer(recorder)
        self.connect()
        self.limiter.remove_observer(recorder)
        self.connect()
        self.assertEqual(len(recorder.told), 1)

    def test_the_base_class_provides_all_of_the_interface(self) -> None:
        verifyObject(ILimiterObserver, LimiterObserver())
