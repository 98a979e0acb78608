"""
Real programs under test, and what they print.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.patience import PATIENCE


def require_program(name: str) -> str:
    """
    The path of a real program; the test is skipped where there is none, and fails where there must be.
    """
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CONNLIMIT_REQUIRE_PROGRAMS"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return path


class Program:
    """
    A running ``twistd``, with its output as it comes.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._lines.append("")
            self._changed.notify_all()

    @property
    def output(self) -> str:
        """
        All that was printed so far.
        """
        return "\n".join(self._lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """
        Wait until the output has a match of the regular expression.
        """
        with self._changed:
            found = self._changed.wait_for(
                lambda: re.search(pattern, self.output) or not self._reader.is_alive(), PATIENCE
            )
        match = re.search(pattern, self.output)
        assert match is not None, f"no {pattern!r} ({found}) in:\n{self.output}"
        return match

    def port(self) -> int:
        """
        The TCP port that it listens on, the first it tells.
        """
        return int(self.wait_for(r"starting on (\d+)")[1])

    def terminate(self) -> int:
        """
        Send SIGTERM and return the exit code; it must come within five seconds.
        """
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        assert time.monotonic() - began < 5
        self._reader.join(PATIENCE)
        return code

    def resident_memory(self) -> int:
        """
        Bytes of memory that are resident now (Linux).
        """
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def twistd_command(*arguments: str) -> list[str]:
    """
    The command line of the twistd that belongs to this Python, in the foreground and without a PID file.
    """
    return [str(Path(sysconfig.get_path("scripts")) / "twistd"), "--nodaemon", "--pidfile=", *arguments]


@contextmanager
def running(
    *arguments: str, cwd: Path | None = None, ulimit: str = "", **environment: str
) -> Iterator[Program]:
    """
    Run ``twistd`` with the arguments as long as the context lasts.

    :param ulimit: arguments for the shell's ``ulimit``, to run it under.
    :param environment: variables besides those of this process.
    """
    command = twistd_command(*arguments)
    if ulimit:
        command = ["sh", "-c", f'ulimit {ulimit}; exec "$@"', "sh", *command]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    program = Program(process)
    try:
        yield program
    finally:
        process.kill()
        process.wait()
        program._reader.join(PATIENCE)
        process.stdout.close()


def failing(*arguments: str, cwd: Path | None = None) -> str:
    """
    Run ``twistd`` with arguments that it must refuse: one sentence, exit code 1. Returns the sentence.
    """
    done = subprocess.run(
        twistd_command(*arguments),
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()
