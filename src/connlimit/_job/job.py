"""
A job: code that runs while it holds a slot.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Generator, Hashable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit.interfaces import IOccupant
from connlimit.limits import Key

T = TypeVar("T")


class Refused(Exception):
    """
    A job got no slot.

    :ivar reason: why: ``full``, ``timeout``, ``peer`` (its key is at its cap and it does not wait) or
        ``draining``.
    :ivar retry_after: seconds after which it would probably get one, as far as can be told.
    """

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason, retry_after)
        self.reason = reason
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.reason}; try again in {self.retry_after:.0f} s"


class Admission(Protocol):
    """
    What a job needs of its limiter.
    """

    def serve_at_once(self, occupant: IOccupant) -> bool:
        """
        Give it a slot, if there is room and nobody waits.
        """

    def serve_heavy_at_once(self, occupant: IOccupant, weight: int) -> bool:
        """
        Give it its slots, if there is room and nobody waits.
        """

    def wait(self, occupant: IOccupant, timeout: float | None = None, weight: int = 1) -> None:
        """
        Put it into the queue.
        """

    def depart(self, occupant: IOccupant) -> None:
        """
        It waits no more.
        """

    def finish(self, occupant: IOccupant) -> None:
        """
        It gives its slot back.
        """

    def finish_heavy(self, occupant: IOccupant) -> None:
        """
        It gives its slots back.
        """

    def retry_after(self) -> float:
        """
        Seconds after which a newcomer would be served.
        """


class GivesSlots(Protocol):
    """
    What gives slots: a `connlimit.Limiter`.
    """

    @property
    def clock(self) -> IReactorTime: ...

    def slot(self, key: Any = None, weight: int = 1, timeout: float | None = None) -> Job: ...


def checked(limiter: GivesSlots) -> GivesSlots:
    """
    The limiter.

    :raises TypeError: if it is none.
    """
    if not callable(getattr(limiter, "slot", None)):
        raise TypeError(f"limiter must be a Limiter, not {limiter!r}")
    return limiter


@implementer(IOccupant)
class Job:
    """
    A slot for a job, as `connlimit.Limiter.slot` gives it; taken by ``async with``, by `run` or by `acquire`.

    It is for one use at a time. One that is taken and then forgotten gives its slot back when it is collected
    as garbage, and that is logged.

    :ivar address: the key that it is known by; None if there is none.
    :ivar weight: how many slots it takes.
    :ivar slot: set by the limiter: None unless it holds its slot.
    """

    __slots__ = ("__weakref__", "_admission", "_body", "_timeout", "_turn", "address", "slot", "weight")

    factory = None

    def __init__(
        self, admission: Admission, key: Hashable = None, weight: int = 1, timeout: float | None = None
    ) -> None:
        self._admission = admission
        self.address: Any = None if key is None else key if IAddress.providedBy(key) else Key(key)
        self.weight = weight
        self._timeout = timeout
        self.slot: Any = None
        # Fires at its turn, while it waits.
        self._turn: Deferred[Job] | None = None
        # What is cancelled if it is to end.
        self._body: Deferred[Any] | None = None

    def __repr__(self) -> str:
        state = "waits" if self._turn is not None else "is over or new" if self.slot is None else "holds it"
        return f"<Job {self.address}: {state}>"

    # How it is used

    def acquire(self) -> Deferred[Job]:
        """
        Take the slot, and keep it until `release`.

        :return: fires at its turn. If this is cancelled before, it leaves the queue; if it is refused, this
            fails with `Refused`.
        :raises RuntimeError: if it is taken, or waited for, already.
        """
        return succeed(self) if self._is_served_at_once() else self._wait()

    def release(self) -> None:
        """
        Give the slot back, if it is held.
        """
        if self.weight == 1:
            self._admission.finish(self)
        else:
            self._admission.finish_heavy(self)

    def run(self, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Deferred[Any]:
        """
        Call a function at its turn, and hold the slot until it is over: until its Deferred has fired, or its
        coroutine has ended, if it returns one.

        :return: fires with its result. If this is cancelled, the job leaves the queue, or what it runs is
            cancelled. If it is refused, this fails with `Refused`.
        :raises RuntimeError: if the slot is taken, or waited for, already.
        """
        if self._is_served_at_once():
            return self._run(self, f, args, kwargs)
        return self._wait().addCallback(self._run, f, args, kwargs)

    async def __aenter__(self) -> Job:
        if not self._is_served_at_once():
            await self._turn_comes()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # How it is done

    def _is_served_at_once(self) -> bool:
        if self.slot is not None or self._turn is not None:
            raise RuntimeError("this slot is taken or waited for already: ask the limiter for one more")
        if self.weight == 1:
            return self._admission.serve_at_once(self)
        return self._admission.serve_heavy_at_once(self, self.weight)

    def _wait(self) -> Deferred[Job]:
        turn: Deferred[Job] = Deferred(self._cancelled)
        self._turn = turn
        self._admission.wait(self, self._timeout, self.weight)
        return turn

    def _run(self, job: Job, f: Callable[..., Any], args: Any, kwargs: Any) -> Deferred[Any]:
        body: Deferred[Any] = maybeDeferred(f, *args, **kwargs)
        if not body.called:
            self._body = body
        return body.addBoth(self._over)

    def _over(self, result: T) -> T:
        self._body = None
        self.release()
        return result

    @types.coroutine
    def _turn_comes(self) -> Generator[Any, Any, None]:
        """
        Wait for its turn in a coroutine, whether Twisted or a task of asyncio runs it.
        """
        turn = self._wait()
        try:
            loop = _loop_of_task()
            if loop is not None:
                future = loop.create_future()
                turn.addBoth(_wake, future)
                # If it is Twisted that runs the coroutine, it gives back at once what is no Deferred.
                if (yield next(future.__await__())) is not future:
                    refusal = future.result()
                    if refusal is not None:
                        turn.addErrback(lambda failure: None)
                        raise refusal
                    return
            yield turn
        except BaseException:
            self._leave()
            raise

    def _cancelled(self, turn: Deferred[Job]) -> None:
        self._turn = None
        self._admission.depart(self)

    def _leave(self) -> None:
        """
        Give up, whether it waits or has had its turn.
        """
        self._turn = None
        if self.slot is None:
            self._admission.depart(self)
        else:
            self.release()

    # What the limiter decides, see IOccupant

    def serve(self) -> None:
        """
        Its turn has come.
        """
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.callback(self)

    def refuse(self, reason: str) -> None:
        """
        It gets no slot.
        """
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.errback(Refused(reason, self._admission.retry_after()))

    def abort(self) -> None:
        """
        Cancel what it runs, as far as that is known, and give the slot back.
        """
        if self._body is not None:
            self._body.cancel()
        self.release()


def _loop_of_task() -> asyncio.AbstractEventLoop | None:
    """
    The loop of the task of asyncio that runs at the moment; None if there is none.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs
        return None
    return None if task is None else task.get_loop()


def _wake(result: T, future: asyncio.Future[Any]) -> T:
    if not future.done():
        future.set_result(result.value if isinstance(result, Failure) else None)
    return result
