"""
What the command lines of our programs have in common.
"""

from __future__ import annotations

import math
import re
import sys

from twisted.python import usage

from connlimit._limiter.settings import did_you_mean, seconds
from connlimit._system.version import __version__
from connlimit._twistd.program import CannotStart


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
        self["status-host"] = []

    def opt_listen(self, description: str) -> None:
        """
        listen at this server endpoint, such as tcp:8080; can be given several times
        """
        self["listen"].append(description)

    def opt_status_host(self, name: str) -> None:
        """
        let browsers ask for the status page by this host name, too; can be given several times
        """
        self["status-host"].append(name)

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
            raise CannotStart(f"{self.program}: {self._explained(str(error))}") from None

    def parseArgs(self, *arguments: str) -> None:
        """
        Demand that there is nothing but options.
        """
        if arguments:
            raise usage.UsageError(f"{arguments[0]} is no option; options begin with --")

    def _explained(self, sentence: str) -> str:
        """
        The sentence on what is wrong, with what may have been meant.
        """
        found = re.fullmatch(r"option --(.*) not recognized|Unknown command: (.*)", sentence)
        if found is None:
            return sentence
        option, command = found.groups()
        ours = [each.rstrip("=") for each in self.longOpt]
        if command is not None:
            sentence = f"there is no twistd plugin {command}"
            hint = did_you_mean(command, [name for name, *_ in getattr(self, "subCommands", ())])
        elif not hasattr(self, "subOptions"):
            hint = did_you_mean(option, ours, lambda name: f"--{name}")
        elif option in ours:
            hint = f"it must stand before {self.subCommand}"
        else:
            theirs = [
                each.rstrip("=") for each in getattr(self.subOptions, "options", self.subOptions).longOpt
            ]
            hint = did_you_mean(option, theirs, lambda name: f"--{name}")
        return f"{sentence}; {hint}" if hint else sentence

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
