"""
The terminal's view of limiters.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.clients import free_port
from support.patience import PATIENCE

from connlimit import Limiter
from connlimit.status import top
from connlimit.status.watch import Watch

STATE = {"limiters": [], "descriptors": {"open": 1, "limit": 2}, "reactor_lag": 0.0, "version": "1.2.3"}


class Page(BaseHTTPRequestHandler):
    """
    The JSON of a status page.
    """

    def do_GET(self) -> None:
        data = json.dumps(STATE).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


class Server(HTTPServer):
    """
    A server that runs in its own thread as long as a context lasts.
    """

    allow_reuse_address = True

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


def command(port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "connlimit.status.top", f"http://127.0.0.1:{port}/", *options]


def start(port: int, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(port, "--interval=0.05", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_whoever_reads_it_may_stop() -> None:
    with Server(("127.0.0.1", 0), Page) as server:
        process = start(server.server_port, "--json")
        assert json.loads(process.stdout.readline()) == STATE
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
        process.stderr.close()


def test_a_server_that_goes_away_is_waited_for_and_that_is_said_once() -> None:
    port = free_port()
    process = start(port, "--json")
    try:
        assert "no answer from" in process.stderr.readline()
        for _ in range(2):
            with Server(("127.0.0.1", port), Page):
                assert "answers" in process.stderr.readline()
                assert json.loads(process.stdout.readline()) == STATE
            assert "no answer from" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest, words = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert words == ""
        assert all(json.loads(line) == STATE for line in rest.splitlines())
    finally:
        process.kill()
        process.communicate()


def test_it_ends_at_whatever_instant_it_is_told_to() -> None:
    code = """
import signal, sys
from connlimit.status import top
class Garbage:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def fetch(url):
    Garbage()
    raise OSError("away")
top.fetch = fetch
sys.exit(top.main(["http://127.0.0.1/", "--interval=30"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_no_status_page_is_not_waited_for() -> None:
    class Other(Page):
        def do_GET(self) -> None:
            self.send_error(404)

    with Server(("127.0.0.1", 0), Other) as server:
        done = subprocess.run(command(server.server_port), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "URL must be that of a status page" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "often"])
def test_a_wrong_interval_gets_one_sentence(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        top.main(["http://127.0.0.1/", f"--interval={interval}"])
    assert ended.value.code == 2
    assert (
        f"--interval: must be a time above 0, such as 30, 500ms, 30s or 5min, not {interval!r}"
        in capsys.readouterr().err
    )


def test_the_version_of_the_server_is_shown() -> None:
    assert "connlimit 1.2.3" in top.lines(STATE)[-1]


def test_of_a_limiter_all_figures_are_shown_that_its_server_tells() -> None:
    facts = Watch(Limiter(5, name="web")).facts()
    lines = top.lines({**STATE, "limiters": [facts]})
    assert lines[:4] == [
        "web",
        f"  served   [{'.' * 30}] 0 of 5",
        f"  waiting  [{'.' * 30}] 0 no limit",
        "  now      longest wait: 0.00 s  exempt now: 0  in the kernel's backlog: unknown",
    ]
    assert lines[5].startswith("  so far   accepted: 0  served so far: 0  finished: 0  ")
    assert max(map(len, lines)) <= 100
    del facts["waits"], facts["backlog"]
    older = "\n".join(top.lines({**STATE, "limiters": [facts]}))
    assert "served after a wait" not in older
    assert "slots reclaimed: 0" in older


def test_the_refused_are_told_by_reason() -> None:
    facts = Watch(Limiter(5)).facts()
    facts["refused"].update(full=3, timeout=2)
    assert "refused: 3 full, 2 timeout" in "\n".join(top.lines({**STATE, "limiters": [facts]}))
