"""
What the command lines of our programs have in common.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from twisted.python import usage

from connlimit._limiter.values import Kind, did_you_mean
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
        found = re.search(r"option --(\S*) not recognized\Z|\AUnknown command: (.*)", sentence)
        if found is None:
            return sentence
        option, command = found.groups()
        ours = [each.rstrip("=") for each in self.longOpt]
        if command is not None:
            sentence = f"there is no twistd plugin {command}"
            hint = did_you_mean(command, [name for name, *_ in getattr(self, "subCommands", ())])
        elif self.subCommand is None:
            hint = did_you_mean(option, ours, lambda name: f"--{name}")
        else:
            hint = f"it must stand before {self.subCommand}" if option in ours else ""
        return f"{sentence}; {hint}" if hint else sentence

    def value(self, name: str, kind: Kind) -> Any:
        """
        The value of an option.

        :raises UsageError: if it is none of that kind.
        """
        try:
            return kind.of_text(f"--{name}", self[name])
        except ValueError as error:
            raise usage.UsageError(str(error)) from None
