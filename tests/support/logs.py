"""
What was logged.
"""

from __future__ import annotations

from twisted.logger import LogLevel, formatEvent, globalLogPublisher


class Log:
    """
    The log while a context lasts.
    """

    def __enter__(self) -> Log:
        self.events: list[dict[str, object]] = []
        globalLogPublisher.addObserver(self.events.append)
        return self

    def __exit__(self, *error: object) -> None:
        globalLogPublisher.removeObserver(self.events.append)

    def warnings(self) -> list[dict[str, object]]:
        """
        What connlimit warns of.
        """
        return [
            event
            for event in self.events
            if event["log_level"] is LogLevel.warn and event["log_namespace"].startswith("connlimit")
        ]

    def failures(self) -> list[str]:
        """
        What anybody logs as a failure, an error that nobody handled in a Deferred among them.
        """
        return [formatEvent(event) for event in self.events if event["log_level"] >= LogLevel.error]

    def texts(self) -> list[str]:
        """
        What connlimit says, as text.
        """
        return [formatEvent(event) for event in self.events if event["log_namespace"].startswith("connlimit")]
