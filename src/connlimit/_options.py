"""
What the command lines of our programs have in common.
"""

from __future__ import annotations

import math
import sys

from twisted.python import usage

from connlimit._program import CannotStart
from connlimit._settings import seconds
from connlimit._version import __version__


class ProgramOptions(usage.Options):
    """
    Options that are right, or end the program with one sentence that says what is wrong with them.

    :cvar program: what the program is called in that sentence.
    :ivar arguments: the command line as it was given.
    """

    program: str
    arguments: list[str]

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, description: str) -> None:
        """
        listen at this server endpoint, such as tcp:8080; can be given several times
        """
        self["listen"].append(description)

    def opt_version(self) -> None:
        """
        show the version, and exit
        """
        print(f"{self.program} {__version__}")
        raise SystemExit(0)

    def parseOptions(self, options: list[str] | None = None) -> None:
        """
        Parse the command line, or end the program.
        """
        self.arguments = list(sys.argv[1:] if options is None else options)
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            raise CannotStart(f"{self.program}: {error}") from None

    def time(self, name: str) -> float:
        """
        The seconds that an option says.

        :raises UsageError: if it says none.
        """
        try:
            value = seconds(self[name])
            if 0 <= value < math.inf:
                return value
        except ValueError:
            pass
        raise usage.UsageError(f"--{name} must be a time such as 30, 30s or 5min, not {self[name]!r}")

    def count(self, name: str, most: float = math.inf) -> int:
        """
        The whole number that an option says, at least 1.

        :raises UsageError: if it says none, or more than *most*.
        """
        text = self[name]
        if text.isascii() and text.isdecimal() and 1 <= int(text) <= most:
            return int(text)
        right = ", 1 or more" if most == math.inf else f" from 1 to {most}"
        raise usage.UsageError(f"--{name} must be a whole number{right}, not {text!r}")
