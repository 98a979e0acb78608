"""
What a worker process is started as: the command line of its parent, and what the parent tells it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from twisted.application.app import ServerOptions
from twisted.logger import globalLogBeginner
from twisted.python.reflect import namedModule

from connlimit._twistd.processes import commands
from connlimit._twistd.processes.log_pipe import LogPipe
from connlimit._twistd.processes.worker import Worker
from connlimit._twistd.program import Program


def make_program(arguments: list[str], assignment: commands.Assignment, worker: Worker) -> Program:
    """
    The program of the parent's command line, with what the parent has read of the file.
    """
    # Not before the reactor is chosen.
    from connlimit._twistd.command_line import Options, makeService

    options = Options(assignment.text)
    options.parent = twistd_options(assignment.twistd)
    options.parseOptions(arguments)
    return makeService(options, worker)


def twistd_options(told: Mapping[str, Any]) -> ServerOptions:
    """
    The options of the parent's twistd, for plugins that look at them.
    """
    options = ServerOptions()
    options.update(told)
    return options


def main() -> None:
    """
    Be a worker: the arguments are the numbers of the control socket and of the pipe for the log, the module
    of the reactor, and the command line of the parent.
    """
    control, log, reactor_module, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent tells what to do
    if hasattr(signal, "SIGHUP"):  # so it may be with this one; no worker reads a file by itself
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    namedModule(reactor_module).install()
    from twisted.internet import reactor

    pipe = LogPipe(reactor, int(log))
    globalLogBeginner.beginLoggingTo([pipe])
    Worker(reactor, partial(make_program, arguments), pipe).serve(int(control))
    pipe.flush()
