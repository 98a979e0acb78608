"""
Each block of code and each command in the documentation is what works.
"""

from __future__ import annotations

import gc
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import ensureDeferred
from support.logs import Log
from support.patience import PATIENCE
from support.programs import require_program, running
from support.semaphores import ours
from support.sockets import patiently
from twisted.internet import endpoints
from twisted.internet.defer import ensureDeferred as start
from twisted.internet.defer import succeed
from twisted.internet.threads import deferToThread

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"

#: What is run by other tests, or cannot be run by one: blocks by their first words, and why.
ELSEWHERE = {
    "$ python3 -m venv .venv && .venv/bin/pip install . &&": "continuous integration, in a fresh clone",
    "$ python3 -m venv .venv && .venv/bin/pip install '.[test]'": "continuous integration, in a fresh clone",
    "$ python3 -m venv .venv\n": "the same in two steps",
    "$ .venv/bin/twistd -n connlimit\n": "test_demonstration",
    "for i in 1 2 3 4 5 6": "needs port 8080; test_demonstration asks in the same way",
    "$ for i in 1 2 3 4 5 6": "needs port 8080; test_demonstration asks in the same way",
    "$ .venv/bin/python docs/examples/limited_echo.py": "test_readme",
    "$ .venv/bin/python\n": "test_readme does the same with that example",
    ">>> a.close()": "test_readme does the same with that example",
    "$ .venv/bin/twistd -ny": "test_command_line",
    "$ .venv/bin/python -m http.server": "it is Python's own server",
    "$ twist --log-format=json": "test_observers",
    "pip install '.[bench]'": "takes minutes; continuous integration runs the quick form",
    "$ python3 -m venv .venv && .venv/bin/pip install -e": "it makes a developer's environment",
    "$ python -m pytest -n 2": "this is it",
    "$ python -m pytest --guarantee": "test_guarantees",
    "$ ruff check": "continuous integration",
    "$ pipx run nox": "it makes environments, from the network",
    "$ python -m bench": "continuous integration runs the quick form",
    "$ towncrier": "needs the tools of a release",
}


@attrs.frozen
class Block:
    """
    A code block: its page, the line where it begins, its language, and its text.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def elsewhere(self) -> bool:
        return any(f"{self.text}\n".startswith(words) for words in ELSEWHERE)


def blocks() -> Iterator[Block]:
    """
    All blocks of all pages.
    """
    for file in [*sorted(ROOT.glob("docs/*.rst")), ROOT / "README.rst", ROOT / "CONTRIBUTING.rst"]:
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            found = re.match(r"( *)\.\. code-block:: (\w+)", line)
            if found:
                body = []
                for each in lines[number + 1 :]:
                    if each.strip() and not each.startswith(found[1] + " "):
                        break
                    body.append(each[len(found[1]) + 3 :])
                yield Block(file.name, number + 1, found[2], "\n".join(body).strip("\n"))


BLOCKS = list(blocks())


def commands(block: Block) -> list[str]:
    """
    The commands of a block of a shell.
    """
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        return [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return text.splitlines()


TWISTD = [
    pytest.param(command, id=f"{block}: {command[:60]}")
    for block in BLOCKS
    if block.language in ("console", "sh") and not block.elsewhere()
    for command in commands(block)
    if "twistd -n" in command
]


def test_every_setting_is_in_the_table_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from connlimit._limiter.settings import FIELDS

    monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
    table = import_module("generated").settings()
    assert re.findall(r"\* - ``(\w+)``", table) == list(FIELDS)
    assert ".. limiter-settings::" in (ROOT / "docs" / "reference.rst").read_text()


def test_every_block_is_executed_here_or_elsewhere() -> None:
    for words, where in ELSEWHERE.items():
        assert any(f"{block.text}\n".startswith(words) for block in BLOCKS), f"no block begins with {words!r}"
        for name in re.findall(r"\btest_\w+", where):
            assert list(ROOT.glob(f"tests/**/{name}.py")), f"there is no {name}"
    here = {"python": ("howto.rst", "semaphores.rst", "README.rst"), "text": ("howto.rst",)}
    for block in BLOCKS:
        if not block.elsewhere() and block.language not in ("console", "sh"):
            assert block.page in here[block.language], str(block)
        if not block.elsewhere() and block.language in ("console", "sh"):
            known = ("twistd -n", "connlimit-top", "curl", "until", "http://", "echo", "-ny")
            assert all(any(word in each for word in known) for each in commands(block)), str(block)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """
    What the commands expect where they are run, with ports that are free.
    """
    for file in ("limited_echo.py", "throttle.toml"):
        shutil.copy(EXAMPLES / file, tmp_path)
    application = (EXAMPLES / "limited_later.tac").read_text()
    (tmp_path / "limited_later.tac").write_text(
        application.replace("tcp:8006:interface=127.0.0.1", "unix:echo").replace("8007", "0")
    )
    text = (EXAMPLES / "connlimit.toml").read_text()
    (tmp_path / "connlimit.toml").write_text(re.sub(r"tcp:80\d\d", "tcp:0", text))
    return tmp_path


@pytest.mark.parametrize("command", TWISTD)
def test_a_command_starts_what_it_says(command: str, folder: Path) -> None:
    command = re.sub(r"tcp:(\d{4})\b(?!:?\d)", "tcp:0", command).replace("tcp:localhost:", "tcp:127.0.0.1:")
    command = command.replace("mypackage.server:factory", "limited_echo:factory").replace(
        "docs/examples/", ""
    )
    arguments = command.split("twistd -n ")[1].split()
    with running(*arguments, cwd=folder) as program:
        if "--check-config" in arguments:
            assert program.process.wait(PATIENCE) == 0
            return
        program.wait_for("starting on")
        if arguments[0] != "web":
            program.wait_for("served at once")
        code = program.terminate()
        assert not re.search("Traceback|Unhandled", program.output), program.output
        assert code == (-signal.SIGTERM if arguments[0] == "web" else 0)


PRELUDE = """
import gc
import sys
import time
from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import Application
from twisted.logger import LogLevel, globalLogPublisher
failures = []
globalLogPublisher.addObserver(lambda event: event["log_level"] >= LogLevel.error and failures.append(event))
from twisted.internet import reactor, ssl, task
from twisted.internet.endpoints import TCP4ServerEndpoint, serverFromString
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer
from connlimit import Limiter, LimitingEndpoint, LimitingFactory
from connlimit.interfaces import ILimit
site, smtp_factory, some_factory, factory = (Factory.forProtocol(Protocol) for _ in range(4))
application = Application("limited")
web, mail, endpoint = (serverFromString(reactor, "tcp:0:interface=127.0.0.1") for _ in range(3))
limiter = Limiter()
context = ssl.CertificateOptions()
country_of = lambda host: "nowhere"
tcp = TCP4ServerEndpoint(reactor, 0)
TCP4ServerEndpoint.__init__.__defaults__ = (50, "127.0.0.1")
"""


#: What an order of one's own is meant to do.
EPILOGUE = """
from twisted.internet.address import IPv4Address
from connlimit._limiter.slots import NullConnection
from connlimit._limiter.queue import Guarded, Queue
queue = Queue(Guarded(OfficeFirst(None, None)), lambda key: True)
hosts = "192.0.2.1", "10.0.0.1", "192.0.2.2", "10.0.0.2"
waiting = [NullConnection(IPv4Address("TCP", host, 1)) for host in hosts]
for now, each in enumerate(waiting):
    queue.add(each, now)
assert list(queue) == waiting and queue.oldest() == (waiting[0], 0)
turns = []
while queue:
    turns.append(queue.next(5))
    queue.remove(turns[-1])
assert [waiting.index(each) for each in turns] == [1, 3, 0, 2], turns
"""

#: What went wrong without being raised, also in a Deferred that nobody looks at.
VERDICT = """
reactor.callWhenRunning(reactor.callLater, 0.1, reactor.stop)
reactor.run()
del each, queue, waiting
gc.collect()
for event in failures:
    print(event)
    if "log_failure" in event:
        event["log_failure"].printTraceback(sys.stdout)
sys.exit(bool(failures))
"""


def test_the_code_of_the_recipes_runs(folder: Path) -> None:
    code = [PRELUDE]
    for block in BLOCKS:
        if block.page in ("howto.rst", "README.rst") and block.language == "python":
            text = block.text.replace("reactor, 8443", "reactor, 0").replace('"tcp:8081', '"tcp:0')
            if not hasattr(
                endpoints, "wrapServerTLS"
            ):  # the page says what takes its place with an older Twisted
                text = re.sub(r".*wrapServerTLS.*", "", text)
            code.append(f"# {block}\n{text}\n")
    code += [EPILOGUE, VERDICT]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language == "text"], ids=str)
def test_an_endpoint_string_is_one(block: Block, certificate: Path) -> None:
    from twisted.internet import reactor
    from twisted.internet.endpoints import serverFromString

    for line in block.text.splitlines():
        serverFromString(reactor, line.strip().replace("server.pem", str(certificate)))


@ensureDeferred
async def test_the_code_that_takes_locks_takes_them(tmp_path: Path) -> None:
    python = [block for block in BLOCKS if block.page == "semaphores.rst" and block.language == "python"]
    shell = [block for block in BLOCKS if block.page == "semaphores.rst" and block.language == "sh"]
    with Log() as log, ours(tmp_path, text=(EXAMPLES / "throttle.toml").read_text()) as server:
        url = f"http://127.0.0.1:{server.port}"
        names: dict[str, Any] = {"use_it": lambda: succeed(None)}
        for block in python:
            text = block.text.replace("http://localhost:8000", url)
            await patiently(deferToThread(exec, compile(text, str(block), "exec"), names))
            for name in ("work", "work_with_a_licence"):
                work = names.pop(name, None)
                if work is not None:
                    working = work()
                    await patiently(working if hasattr(working, "addCallback") else start(working))
        await names["semaphores"].close()
        for block in shell:
            text = block.text.replace("http://localhost:8000", url)
            command = [require_program("bash"), "-ec", text]
            done = await patiently(
                deferToThread(subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE)
            )
            assert done.returncode == 0, done
            assert "working" in done.stdout
        assert server.ask("GET", "/remainder?semaphore=database") == (200, "50")
        assert server.ask("GET", "/remainder?semaphore=licence") == (200, "3")
        names.clear()
        gc.collect()
        assert log.failures() == []
        assert "Traceback" not in server.program.output
