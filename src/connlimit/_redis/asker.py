"""
What asks a Redis over the link that a process has to it.
"""

from __future__ import annotations

from typing import Any

from zope.interface import Attribute, Interface

from connlimit._redis.client import Script


class IAsker(Interface):
    """
    What asks a Redis. None of its methods may raise; if one does, that is logged.
    """

    member: str = Attribute("Its name, which begins with that of the link's process.")
    channel: str = Attribute("What it hears, once it has called `Link.hear`.")
    script: Script = Attribute("The script that it asks, with its keys.")
    patience: float = Attribute("Seconds in which an answer should come.")

    def question(same: int) -> str:
        """
        The argument of the script, at the moment it is sent.

        :param same: the number of the connection over which that is done.
        """

    def answered(answer: Any) -> None:
        """
        What the script returned.
        """

    def rejected(error: Exception) -> None:
        """
        Redis refused to carry the script out.
        """

    def slow() -> None:
        """
        The answer takes a while.
        """

    def unreachable(error: Exception) -> None:
        """
        There is no Redis, nor an answer; told again at each attempt that fails.
        """

    def reachable() -> None:
        """
        There is a new connection. Whatever was asked before and not answered is forgotten.
        """

    def heard(message: str) -> None:
        """
        Something was published on its channel, or for it; an empty text if something may have been missed.
        """

    def deaf() -> None:
        """
        Nothing is heard any more, until something is.
        """
