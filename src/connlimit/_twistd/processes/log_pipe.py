"""
What a worker logs, on its way to its parent: a line of JSON for each event.
"""

from __future__ import annotations

import os
import select
import threading
from typing import Any

from twisted.internet.interfaces import IWriteDescriptor
from twisted.logger import ILogObserver, Logger, LogLevel, eventAsJSON, eventFromJSON, formatEvent
from twisted.python.failure import Failure
from twisted.python.reflect import safe_str
from zope.interface import implementer

_log = Logger(namespace="connlimit.workers")

#: How many bytes are kept for a parent that does not read.
MAX_BYTES = 1 << 20

#: Seconds that the last lines of a process may take.
_LAST_WORDS = 1.0

#: What a failure's exception says, which JSON cannot hold.
_SAID = "connlimit_failure_said"


class ErrorOfWorker(Exception):
    """
    Stands for an exception of another process; has its text.
    """


def as_line(event: dict[str, Any]) -> bytes:
    """
    An event, as a line; it keeps its format and all fields that JSON can tell.
    """
    failure = event.get("log_failure")
    try:
        told = event if failure is None else {**event, _SAID: safe_str(failure.value)}
        return eventAsJSON(told).encode() + b"\n"
    except Exception:
        plain = {
            "log_time": event.get("log_time"),
            "log_namespace": event.get("log_namespace", "connlimit"),
            "log_format": "{text}",
            "text": formatEvent(event),
        }
        level = event.get("log_level")
        return eventAsJSON({**plain, "log_level": level or LogLevel.info}).encode() + b"\n"


def of_line(line: bytes, worker: int) -> dict[str, Any]:
    """
    The event that a line holds, as one of this process that names the worker.

    :raises ValueError: if it holds none.
    """
    event = eventFromJSON(line.decode())
    level, namespace = event.get("log_level"), event.get("log_namespace")
    system = event.get("log_system") or f"{namespace}#{level.name if level else '-'}"
    said, failure = event.pop(_SAID, None), event.get("log_failure")
    if said is not None and isinstance(failure, Failure):
        failure.value = ErrorOfWorker(said)
    return {**event, "log_system": f"worker {worker}, {system}", "worker": worker}


@implementer(IWriteDescriptor, ILogObserver)
class LogPipe:
    """
    A log observer that writes events to a pipe, and never waits for its reader.

    :ivar dropped: how many events were dropped since the last was written, because nobody reads.
    """

    def __init__(self, reactor: Any, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        self.dropped = 0
        self._reactor = reactor
        self._descriptor = descriptor
        self._unwritten = bytearray()
        self._lock = threading.RLock()
        self._is_writing = False
        self._is_over = False

    def __call__(self, event: dict[str, Any]) -> None:
        """
        Log an event, in any thread.
        """
        line = as_line(event)
        with self._lock:
            if self._is_over:
                return
            if len(self._unwritten) + len(line) > MAX_BYTES:
                self.dropped += 1
                return
            self._unwritten += line
            if not self._is_writing:
                self._write()
                if self._unwritten:
                    self._is_writing = True
                    self._reactor.callFromThread(self._reactor.addWriter, self)

    def flush(self) -> None:
        """
        Write what is left, if somebody reads it soon.
        """
        with self._lock:
            while self._unwritten and not self._is_over:
                if not select.select([], [self._descriptor], [], _LAST_WORDS)[1]:
                    return
                self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                del self._unwritten[: os.write(self._descriptor, self._unwritten)]
        except BlockingIOError:
            pass
        except OSError:  # there is no parent any more
            self._end()
        if self.dropped and not self._unwritten:
            count, self.dropped = self.dropped, 0
            _log.warn("{count} lines of the log were dropped, as the parent did not read them", count=count)

    def _end(self) -> None:
        self._is_over = True
        self._unwritten.clear()

    # IWriteDescriptor

    def doWrite(self) -> None:
        """
        Write what the pipe takes.
        """
        with self._lock:
            self._write()
            if not self._unwritten:
                self._is_writing = False
                self._reactor.removeWriter(self)

    def fileno(self) -> int:
        """
        The descriptor of the pipe.
        """
        return self._descriptor

    def logPrefix(self) -> str:
        """
        What the log calls it.
        """
        return "log"

    def connectionLost(self, reason: Failure) -> None:
        """
        Nobody reads any more.
        """
        with self._lock:
            self._end()
