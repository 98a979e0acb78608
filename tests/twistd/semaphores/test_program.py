"""
The server of semaphores as a program.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from support.clients import free_port, page_until
from support.patience import PATIENCE
from support.programs import failing, running, twistd_command
from support.semaphores import Server, in_thread, ours, wait_until_pending


def test_it_starts_without_a_file_and_says_so(tmp_path: Path) -> None:
    with running("connlimit-semaphores", "--listen", "tcp:0:interface=127.0.0.1", cwd=tmp_path) as program:
        program.wait_for("throttle.toml: there is no such file, so there are no semaphores")
        assert Server(program.port()).ask("GET", "/metrics") == (200, "")
        assert program.terminate() == 0


@pytest.mark.parametrize("name", ["absent.toml", "throttle.toml", "", "."])
def test_a_file_that_is_named_must_be_there(tmp_path: Path, name: str) -> None:
    sentence = failing("connlimit-semaphores", "--config", name, cwd=tmp_path)
    assert sentence.startswith(f"connlimit-semaphores: {name or '.'}: the file cannot be read")


def test_it_warns_of_a_file_without_semaphores(tmp_path: Path) -> None:
    with ours(
        tmp_path, text='litter_collection_interval = "10ms"\n[logging.stderr]\nlevel = "WARN"\n'
    ) as server:
        server.program.wait_for("no semaphores configured")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen", "nonsense:1"], "--listen must be an endpoint such as"),
        (
            ["--grace", "long"],
            "--grace must be a time of 0 or more, such as 30, 500ms, 30s or 5min, not 'long'",
        ),
        (["--drain-timeout", "-1"], "--drain-timeout must be a time of 0 or more, such as"),
        (["--max-peers", "0"], "--max-peers must be a whole number, 1 or more, not '0'"),
        (["--status", "nonsense"], "--status must be an endpoint"),
        (["--max-per-peer", "x"], "--max-per-peer must be a whole number, 1 or more, not 'x'"),
        (["--max-peers", "1", "--store", "redis://localhost"], "--max-peers must be left out with --store"),
        (["--grace", "1", "--store", "redis://localhost"], "--grace must be left out with --store"),
        (["--store", "http://localhost"], "--store must name a Redis"),
        (["--nonsense"], "option --nonsense not recognized"),
    ],
)
def test_a_wrong_option_ends_it_with_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    assert sentence in failing("connlimit-semaphores", *arguments, cwd=tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[semaphores", "this is not TOML"),
        ("semaphores = 1", "semaphores must be a table"),
        ('[semaphores]\nA = "1"', "semaphores.A must be a whole number, or have one as max, not '1'"),
        ("[semaphores]\nA = true", "semaphores.A must be a whole number"),
        (
            "[semaphores]\nA = { level = 1 }",
            "semaphores.A must be a whole number, or have one as max, not None",
        ),
        (
            "[semaphores]\nA = { max = 1, level = 'x' }",
            "level of semaphores.A must be a whole number, not 'x'",
        ),
        ("[semaphores]\nA = 9223372036854775808", "semaphores.A must be a whole number"),
    ],
)
def test_a_wrong_file_ends_it_with_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "throttle.toml").write_text(text)
    assert sentence in failing("connlimit-semaphores", cwd=tmp_path)


def test_a_port_in_use_ends_it_with_one_sentence(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        listen = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        done = subprocess.run(
            twistd_command("connlimit-semaphores", "--listen", listen),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 1
    assert "Address already in use" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_sigterm_lets_requests_have_their_locks_first(tmp_path: Path) -> None:
    with ours(tmp_path) as server:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        # Kept alive, and of use to nobody: it must not be waited for.
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        idle.request("GET", "/health")
        idle.getresponse().read()
        releasing = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        releasing.connect()
        waiting = in_thread(lambda: server.acquire(waiter, "C", 1, "block_for=1s"))
        wait_until_pending(server, waiter)
        began = time.monotonic()
        server.program.process.send_signal(signal.SIGTERM)
        assert waiting() == 202
        assert server.program.process.wait(PATIENCE) == 0
        assert 0.5 < time.monotonic() - began < 5
        idle.close()
        releasing.close()


def test_requests_that_would_wait_too_long_are_told_that_their_locks_are_pending(tmp_path: Path) -> None:
    with ours(tmp_path, "--drain-timeout", "200ms") as server:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        waiting = in_thread(lambda: server.acquire(waiter, "C", 1, "block_for=1h"))
        wait_until_pending(server, waiter)
        assert server.program.terminate() == 0
        assert waiting() == 202


def test_it_can_be_killed_and_started_at_the_same_port_at_once(tmp_path: Path) -> None:
    port = free_port()
    for _ in range(3):
        with ours(tmp_path, port=port) as server:
            peer = server.new_peer()
            server.acquire(peer, "A")
            assert server.ask("GET", "/remainder?semaphore=A") == (200, "4")


def test_sighup_reads_the_file_again_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    with ours(tmp_path) as server:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        waiting = in_thread(lambda: server.acquire(waiter, "C", 1, "block_for=30s"))
        wait_until_pending(server, waiter)
        file = tmp_path / "throttle.toml"
        file.write_text("[semaphores]\nC = 'x'")
        server.program.process.send_signal(signal.SIGHUP)
        server.program.wait_for("semaphores.C must be a whole number.*nothing was changed")
        file.write_text("[semaphores]\nC = 2\nD = 1")
        server.program.process.send_signal(signal.SIGHUP)
        assert waiting() == 200
        assert server.ask("GET", "/remainder?semaphore=C") == (200, "0")
        assert server.ask("GET", "/remainder?semaphore=A") == (400, "Unknown semaphore")
        assert server.ask("GET", "/remainder?semaphore=D") == (200, "1")


def test_the_status_page_shows_who_holds_what(tmp_path: Path) -> None:
    port = free_port()
    text = '[semaphores]\n"<A>" = 2\n'
    with ours(tmp_path, "--status", f"tcp:{port}:interface=127.0.0.1", text=text) as server:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "<A>", 2)
        server.acquire(waiter, "<A>", 1)
        status = Server(port)
        facts = json.loads(status.ask("GET", "/status.json")[1])["semaphores"]
        assert facts[0]["name"] == "<A>"
        assert (facts[0]["full_count"], facts[0]["acquired"], facts[0]["pending"]) == (2, 2, 1)
        assert facts[0]["holders"][0]["peer"] == holder
        page = status.ask("GET", "/")[1]
        assert "&lt;A&gt;" in page
        assert "<A>" not in page
        assert str(holder) in page
        assert status.ask("GET", "/metrics")[0] in (200, 501)


def test_in_a_browser_semaphores_are_shown_by_the_server_and_by_its_status_page(
    browser: object, tmp_path: Path
) -> None:
    port = free_port()
    with ours(tmp_path, "--status", f"tcp:{port}:interface=127.0.0.1") as server:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        server.acquire(waiter, "C")
        browser.get(f"http://127.0.0.1:{server.port}/")
        page_until(browser, "C 1 2 1 1")  # full count, level, acquired, pending
        assert browser.get_log("browser") == []
        browser.get(f"http://127.0.0.1:{port}/")
        page_until(browser, "live")
        page_until(browser, "1 acquired of 1")
        page_until(browser, str(holder))
        server.release(waiter, "C")
        server.release(holder, "C")
        page_until(browser, "0 acquired of 1")
        assert browser.get_log("browser") == []


def test_many_peers_share_semaphores_through_a_restart_and_nobody_is_forgotten(tmp_path: Path) -> None:
    """
    Two hundred peers take and give back locks at random, some go away without a word, and the server
    is killed and started again in between. What they hold by their own account never exceeds what there is.
    """
    port = free_port()
    full = {"A": 5, "/&": 2}
    lock = threading.Lock()
    held = dict.fromkeys(full, 0)
    maximum = dict.fromkeys(full, 0)
    failures: list[str] = []
    counts = {"served": 0, "restored": 0, "expired": 0}
    halfway, ended = threading.Event(), threading.Event()

    def client(number: int) -> None:
        choose = random.Random(number)
        server = Server(port)

        def ask(method: str, path: str, body: object = None) -> tuple[int, str]:
            while True:
                try:
                    return server.ask(method, path, body)
                except (OSError, http.client.HTTPException):
                    if ended.wait(0.05):
                        raise

        def restore(peer: int, acquired: dict[str, int]) -> None:
            body = {"expires_in": "60s", "peer_id": peer, "acquired": acquired}
            assert ask("POST", "/restore", body) == (200, "Ok")
            with lock:
                counts["restored"] += len(acquired)

        def use(peer: int, name: str, count: int, vanishes: bool) -> None:
            path = f"/peers/{peer}/{quote(name, safe='')}"
            expires_in = "60s" if not vanishes else "1500ms"
            while True:
                status, text = ask("PUT", f"{path}?expires_in={expires_in}&block_for=1s", count)
                if status == 200:
                    break
                if status == 400 and text == "Unknown peer":
                    restore(peer, {})
                else:
                    assert status == 202, text
            with lock:
                held[name] += count
                maximum[name] = max(maximum[name], held[name])
                counts["served"] += 1
                if counts["served"] == 150:
                    halfway.set()
            time.sleep(choose.random() * 0.02)
            if not vanishes and ask("PUT", f"/peers/{peer}", {"expires_in": "60s"})[0] == 400:
                restore(peer, {name: count})
            with lock:
                held[name] -= count
            if vanishes:
                with lock:
                    counts["expired"] += 1
            else:
                answer = ask("DELETE", path)
                # It may be killed between the heartbeat and this, and know of nobody then.
                assert answer == (200, "Ok") or (halfway.is_set() and answer == (400, "Unknown peer"))

        try:
            for turn in range(2):
                vanishes = turn == 1 and number % 20 == 0
                peer = int(ask("POST", "/new_peer", {"expires_in": "60s"})[1])
                name = choose.choice(sorted(full))
                use(peer, name, choose.randint(1, full[name]), vanishes)
                if not vanishes:
                    ask("DELETE", f"/peers/{peer}")
        except Exception as error:
            failures.append(repr(error))

    with ours(tmp_path, port=port) as server:
        clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(200)]
        for each in clients:
            each.start()
        assert halfway.wait(PATIENCE)
        server.program.process.kill()
        server.program.process.wait()
    with ours(tmp_path, "--grace", "2s", port=port) as server:
        for each in clients:
            each.join(PATIENCE * 2)
        assert not failures
        assert (counts["served"], counts["expired"]) == (400, 10)
        assert counts["restored"]
        began = time.monotonic()
        while server.ask("GET", "/peers/") != (200, "[]"):
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.05)
        assert server.ask("GET", "/remainder?semaphore=A") == (200, "5")
        assert server.ask("GET", "/remainder?semaphore=%2F%26") == (200, "2")
    ended.set()
    assert maximum == full
