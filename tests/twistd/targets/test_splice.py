"""
Bytes moved by the kernel, from one socket to another.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from pytest_twisted import ensureDeferred
from support.patience import PATIENCE
from support.relays import pytest_generate_tests, relayed, way  # noqa: F401  # for pytest

from connlimit._twistd.targets import splice


@ensureDeferred
async def test_without_a_pipe_everything_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    splice._pipe.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pipe2", fail)
        async with relayed() as relay:
            client, backend = await relay.pair()
            client.transport.write(b"question")
            await backend.receives(b"question")
            backend.transport.write(b"x" * 3_000_000)
            await client.receives(b"x" * 3_000_000)


def test_a_forked_process_has_a_pipe_of_its_own() -> None:
    if not hasattr(os, "fork") or not hasattr(os, "splice"):
        pytest.skip("there is no fork, or no splice")
    code = (
        "import os; from connlimit._twistd.targets import splice\n"
        "mine = os.fstat(splice._pipe()[0]).st_ino\n"
        "if os.fork(): raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "os._exit(os.fstat(splice._pipe()[0]).st_ino == mine)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0
