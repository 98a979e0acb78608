"""
What the command lines of our programs have in common.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from twisted.python import usage

from connlimit._limiter.values import Kind, did_you_mean
from connlimit._system.version import __version__
from connlimit._twistd.program import CannotStart


def parameter(
    name: str, help: str, values: str = "", default: str | None = None, shown: str | None = None
) -> list[str | None]:
    """
    An option that has a value, as Twisted's ``optParameters`` have it.

    :param values: what its values are.
    :param default: the text that stands for one that is not given; None if that is something else.
    :param shown: what the help text says of the default; that default if not given.
    """
    shown = default if shown is None else shown
    facts = [*([values] if values else []), *([] if shown is None else [f"default: {shown}"])]
    return [name, None, default, f"{help} [{'; '.join(facts)}]" if facts else help]


class ProgramOptions(usage.Options):
    """
    Options that are right, or end the program with one sentence that says what is wrong with them.

    :cvar program: what the program is called in that sentence.
    :cvar longdesc: what the program does.
    :cvar groups: the names of the options by the title of their group, in the order of the help text.
    :cvar examples: commands that end the help text.
    :ivar arguments: the command line as it was given.
    """

    program: str
    longdesc: str
    groups: Mapping[str, Sequence[str]]
    examples: Sequence[str]
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

    def getUsage(self, width: int | None = None) -> str:
        """
        What the program does, its options in groups, what it can be told to run, and examples.
        """
        width = width or int(os.environ.get("COLUMNS", "80"))
        options = {each.rstrip("="): f"--{each}" for each in self.longOpt}
        parts = ["", *textwrap.wrap(self.longdesc, max(20, width))]
        for title, names in self.groups.items():
            rows = ((options[name], self.docs[name] or "") for name in names)
            parts += ["", f"{title}:", *_rows(rows, width)]
        commands = [(name, description or "") for name, *_, description in getattr(self, "subCommands", ())]
        if commands:
            parts += ["", "Plugins:", *_rows(commands, width)]
        parts += ["", "Examples:", *(f"  {each}" for each in self.examples)]
        return "\n".join(parts) + "\n"

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
            raise usage.UsageError(f"{arguments[0]} is not an option; options begin with --")

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


def _rows(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    """
    Names and what is said of them, in two columns.
    """
    column = 28
    for name, text in rows:
        words = " ".join(text.split())
        # A narrow terminal breaks the lines itself.
        first, *others = textwrap.wrap(words, max(20, width - column), break_on_hyphens=False) or [""]
        head = f"  {name}"
        if len(head) < column:
            yield f"{head:{column}}{first}"
        else:
            yield head
            yield " " * column + first
        yield from (" " * column + each for each in others)
