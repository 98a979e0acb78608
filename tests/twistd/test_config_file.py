"""
The configuration file: what it may say, and all that is wrong with it at once.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.applications import ECHO
from support.patience import PATIENCE
from support.programs import failing, running, twistd_command

from connlimit import refusals
from connlimit._limiter.settings import Settings
from connlimit._system.files import MAX_BYTES
from connlimit._twistd.config import Config, LimiterConfig, ServiceConfig, Spelling, StatusConfig
from connlimit._twistd.config_file import read
from connlimit._twistd.services.parts import check
from connlimit._twistd.targets.relay_options import RelayOptions
from connlimit._twistd.toml import ConfigError

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "connlimit.toml"

SMALL = """
[limiters.web]
max_connections = 5
[services.site]
listen = "tcp:0"
forward = "tcp:localhost:9000"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "connlimit.toml"
    path.write_text(text)
    return path


def errors_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(written(folder, text))
    return caught.value.errors


def test_a_small_file_is_enough(tmp_path: Path) -> None:
    assert read(written(tmp_path, SMALL)) == Config(
        {"web": LimiterConfig(Settings(max_connections=5, name="web"))},
        {"site": ServiceConfig("site", "web", ("tcp:0",), "tcp:localhost:9000")},
    )


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    config = read(
        written(
            tmp_path,
            """
            drain_timeout = "1min 60s"
            processes = 4
            [limiters.a]
            wait_timeout = "500ms"
            idle_timeout = 5
            max_rate = 2.5
            peer_prefix = [24, 56]
            exempt = ["127.0.0.1", "::1"]
            notice = [5, 'wait\\r\\n']
            refusal = "smtp"
            dry_run = true
            order = "lifo"
            [services.s]
            plugin = ["web", "--path=."]
            when_full = "stop-accepting"
            [status]
            listen = "tcp:8081"
            show_peers = "yes"
            hosts = ["status.example"]
            """,
        )
    )
    limiter = config.limiters["a"].settings.changed()
    assert [str(each) for each in limiter.pop("exempt").networks] == ["127.0.0.1/32", "::1/128"]
    assert limiter == {
        "name": "a",
        "wait_timeout": 0.5,
        "idle_timeout": 5,
        "max_rate": 2.5,
        "peer_prefix": (24, 56),
        "notice": (5, b"wait\r\n"),
        "refusal": refusals.SMTP,
        "dry_run": True,
        "order": "lifo",
    }
    assert config.drain_timeout == 120
    assert config.processes == 4
    assert "processes: 4" in config.summary()
    assert config.services["s"].plugin == ("web", "--path=.")
    assert config.status == StatusConfig("tcp:8081", True, ("status.example",))


def test_how_a_relay_treats_its_connections_is_said_beside_forward(tmp_path: Path) -> None:
    config = read(
        written(
            tmp_path,
            """
            [limiters.a]
            max_connections = 5
            [services.plain]
            listen = "tcp:1"
            forward = "tcp:localhost:9000"
            [services.set]
            listen = "tcp:2"
            forward = "tcp:localhost:9000"
            connect_timeout = 2
            client_fin_timeout = "500ms"
            server_fin_timeout = "1min"
            send_proxy = true
            """,
        )
    )
    assert config.services["plain"].relay == RelayOptions(5.0, 1.0, 60.0, False)
    assert config.services["set"].relay == RelayOptions(2, 0.5, 60, True)
    assert "forwards to tcp:localhost:9000 with a PROXY header" in "\n".join(config.summary())


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ('forward = "tcp:localhost:1"\nconnect_timeout = 0', "connect_timeout must be a time above 0"),
        (
            'forward = "tcp:localhost:1"\nserver_fin_timeout = "soon"',
            "server_fin_timeout must be a time above 0",
        ),
        (
            'forward = "tcp:localhost:1"\nsend_proxy = "maybe"',
            "send_proxy must be yes or no, true or false, not 'maybe'",
        ),
        ('forward = "tls:localhost:1"\nsend_proxy = true', "send_proxy must be left out with forward tls:"),
        ('factory = "a:b"\nconnect_timeout = 5', "connect_timeout needs forward"),
    ],
)
def test_what_is_wrong_beside_forward_is_told(tmp_path: Path, lines: str, error: str) -> None:
    (told,) = errors_of(
        tmp_path, f'[limiters.a]\nmax_connections = 5\n[services.s]\nlisten = "tcp:1"\n{lines}\n'
    )
    assert f"[services.s] {error}" in told


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    errors = errors_of(
        tmp_path,
        """
        drain_timeout = "soon"
        colour = "red"
        [limiters.web]
        max_conections = 5
        wait_timeout = "-3s"
        refusal = "htpp"
        [services.one]
        listen = 8080
        forward = "tcp:localhost:9000"
        factory = "a:b"
        limiter = "wbe"
        [services.two]
        forward = "tcp:localhost:9000"
        [services.three]
        listen = "tcp:1"
        plugin = ["web"]
        [status]
        show_peers = "maybe"
        """,
    )
    file = f"{tmp_path / 'connlimit.toml'}: "
    assert all(error.startswith(file) and "\n" not in error for error in errors)
    told = "\n".join(error.removeprefix(file) for error in errors)
    for words in (
        "drain_timeout must be a time of 0 or more, such as 30, 500ms, 30s or 5min, not 'soon'",
        "colour is not known; there are limiters, services, status, drain_timeout, log_connections",
        "[limiters.web] max_conections is not known; did you mean max_connections?",
        "[limiters.web] wait_timeout must be a time above 0, such as 30, 500ms, 30s or 5min, or none",
        "[limiters.web] refusal must be close, reset,",
        "[services.one] listen must be an endpoint such as 'tcp:8080', or several, not 8080",
        "[services.one] limiter must be the name of a limiter (web), not 'wbe'",
        "[services.one] needs one of forward, factory, plugin and tac, not forward and factory",
        "[services.two] listen is missing",
        "[services.three] listen must be left out with plugin",
        "[status] listen must be an endpoint such as 'tcp:8081:interface=127.0.0.1', and is missing",
        "[status] show_peers must be yes or no, true or false, not 'maybe'",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "limiters must be at least one table"),
        ("[limiters.a]\nmax_rate = 1\n", "services must be at least one table"),
        (
            "[limiters.a]\n",
            "[limiters.a] nothing would be limited: give max_connections, max_per_peer, max_rate or",
        ),
        ("[limiters.a]\nmax_connections = 1\nmax_burst = 2", "[limiters.a] max_burst needs max_rate"),
        (
            "[limiters.a]\nmax_per_peer = 0",
            "[limiters.a] max_per_peer must be a whole number, 1 or more, or none",
        ),
        ("[limiters.a]\nnotice = 5", "[limiters.a] notice must be a time above 0 and what is said then"),
        ("limiters = 5\n", "limiters must be tables, not 5"),
        ("[limiters]\na = 5\n", "[limiters] a must be a table with a name, not 5"),
        ("this is not TOML", "this is not TOML"),
        (SMALL + 'skip = "tcp:1"', "[services.site] skip must be left out without plugin or tac"),
        (
            SMALL.replace("forward", "tac"),
            "[services.site] listen must be left out with tac, which listens by its",
        ),
        (SMALL + "[limiters.other]\n", "limiter must be the name of a limiter (web, other), and is missing"),
        ("status = 5\n" + SMALL, "status must be a table, not 5"),
        ("processes = 0\n" + SMALL, "processes must be a whole number from 1 to 1024, not 0"),
        (
            "worker_timeout = 0.5\n" + SMALL,
            "worker_timeout must be a time of 1 second or more, such as 30, 500ms, 30s or 5min, not 0.5",
        ),
        ("processes = true\n" + SMALL, "processes must be a whole number from 1 to 1024, not true"),
    ],
)
def test_each_mistake_gets_a_sentence(text: str, words: str, tmp_path: Path) -> None:
    assert words in "\n".join(errors_of(tmp_path, text))


def test_a_file_that_cannot_be_read_gets_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match="the file cannot be read"):
            read(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="this is not TOML"):
        read(tmp_path / "binary")


def test_what_is_no_regular_file_or_too_large_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path(os.devnull)):
        with pytest.raises(ConfigError, match="the file cannot be read: it is not a regular file"):
            read(path)
    (tmp_path / "large").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="the file cannot be read: it has more than 1048576 bytes"):
        read(tmp_path / "large")


def test_a_fifo_on_the_command_line_gets_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    sentence = failing("connlimit", "--config", str(tmp_path / "fifo"))
    assert sentence.endswith("fifo: the file cannot be read: it is not a regular file")


@pytest.mark.parametrize(
    ("service", "sentences"),
    [
        (
            'plugin = ["procmon", "true"]',
            ["procmon has no service that listens, so there is nothing to limit"],
        ),
        (
            'plugin = ["ftp", "--port=0"]\nwhen_full = "stop-accepting"',
            ["when_full must be refuse, not stop-accepting, for ftp, which listens without endpoints"],
        ),
        ('plugin = ["web", "--path=.", "--nonsense"]', ["plugin web does not take these arguments"]),
        ('plugin = ["web", "--listen=tcp:x"]', ["web cannot be made with these options"]),
        (
            'listen = ["tpc:1", "tcp:x"]\nforward = "tcp:"',
            ["listen must be an endpoint", "listen must be an endpoint", "forward must be an endpoint"],
        ),
    ],
)
def test_all_that_the_start_needs_is_checked(service: str, sentences: list[str], tmp_path: Path) -> None:
    from twisted.internet import reactor

    path = written(tmp_path, f"[limiters.web]\nmax_connections = 5\n[services.site]\n{service}\n")
    with pytest.raises(ConfigError) as caught:
        check(read(path), Spelling(path), reactor)
    assert len(caught.value.errors) == len(sentences)
    for error, sentence in zip(caught.value.errors, sentences, strict=True):
        assert sentence in error
        assert error.startswith(f"{path}: [services.site] ")


def test_a_plugin_finds_the_options_of_twistd_as_without_us(tmp_path: Path) -> None:
    """
    Some look at them, as carbon-cache does, and change them.
    """
    (tmp_path / "twisted" / "plugins").mkdir(parents=True)
    (tmp_path / "twisted" / "plugins" / "looking.py").write_text(
        "from twisted.application.service import ServiceMaker\n"
        'looking = ServiceMaker("Looking", "looking", "Looks at the options.", "looking")\n'
    )
    (tmp_path / "looking.py").write_text(
        "from twisted.application import strports\n"
        "from twisted.python import usage\n"
        "from echo_server import factory\n"
        "class Options(usage.Options):\n"
        "    def postOptions(self):\n"
        "        twistd = self.parent\n"
        "        self.seen = [twistd['pidfile'], twistd['nodaemon'], twistd.subCommand]\n"
        "        self.seen.append(twistd.subOptions is self)\n"
        "        twistd['pidfile'] = 'changed.pid'\n"
        "def makeService(options):\n"
        "    print('seen', *options.seen, options.parent.subCommand)\n"
        "    return strports.service('tcp:0:interface=127.0.0.1', factory)\n"
    )
    (tmp_path / "echo_server.py").write_text(ECHO)
    path = written(tmp_path, '[limiters.a]\nmax_connections = 5\n[services.s]\nplugin = ["looking"]\n')
    for arguments in (
        ["--max-connections=1", "looking"],
        ["--config", str(path)],
        ["--max-connections=1", "--processes=2", "looking"],
    ):
        with running("connlimit", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path)) as program:
            program.wait_for("seen  1 looking True looking")
            if "--processes=2" in arguments:
                program.wait_for(r"\[worker 1, stdout.*\] seen \S*changed.pid 1 looking True looking")
            program.wait_for("1 served at once|5 served at once")
            assert program.terminate() == 0


def test_the_example_is_right_and_check_config_says_what_it_does() -> None:
    done = subprocess.run(
        twistd_command("connlimit", "--config", str(EXAMPLE), "--check-config"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "limiter web: max_connections=500" in done.stdout
    assert (
        "service site: listens at tcp:8080, tcp6:8443, forwards to tcp:localhost:9000, behind limiter web"
    ) in done.stdout
    assert "service files: runs web --listen=tcp:8090 --path=., behind limiter web" in done.stdout
    assert "status page: listens at tcp:8081:interface=127.0.0.1" in done.stdout


def test_on_the_command_line_all_mistakes_are_told_and_nothing_is_started(tmp_path: Path) -> None:
    path = written(
        tmp_path, SMALL.replace("5", "-5") + '[services.x]\nlisten = "tpc:1"\nforward = "tcp:localhost:1"\n'
    )
    assert "max_connections must be" in failing("connlimit", "--config", str(path))
    path = written(
        tmp_path,
        SMALL.replace("tcp:0", "tpc:0") + '[services.x]\nlisten = "tcp:0"\nfactory = "nowhere:factory"\n',
    )
    done = subprocess.run(
        twistd_command("connlimit", "--config", str(path)), capture_output=True, text=True, timeout=PATIENCE
    )
    first, second = done.stderr.splitlines()
    assert done.returncode == 1
    assert "[services.site] listen must be an endpoint" in first
    assert "[services.x] factory nowhere:factory failed" in second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "x.toml", "--max-connections", "5"], "--max-connections must be in the file"),
        (["--config", "x.toml", "--listen", "tcp:1"], "--listen must be in the file"),
        (["--check-config"], "--check-config needs --config FILE"),
        (["--config", "/nowhere.toml"], "the file cannot be read"),
        (["--config", ""], "the file cannot be read"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(arguments: list[str], words: str) -> None:
    assert words in failing("connlimit", *arguments)


SCALARS = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(),
    st.sampled_from(["tcp:0", "web", "http", "5s", "fair", "none"]),
)
KEYS = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "limiters",
            "services",
            "status",
            "drain_timeout",
            "max_connections",
            "listen",
            "forward",
            "plugin",
            "limiter",
            "refusal",
            "notice",
            "exempt",
            "peer_prefix",
            "wait_timeout",
            "factory",
            "when_full",
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


@settings(max_examples=10_000, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["limiters", "services", "status", "drain_timeout", "other"]),
        st.one_of(VALUES, st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=4), max_size=2)),
        max_size=4,
    )
)
def test_whatever_it_says_it_is_right_or_wrong(document: dict[str, object]) -> None:
    from connlimit._twistd.config_file import _Reader

    errors: list[str] = []
    try:
        _Reader("file").config(document)
    except ConfigError as error:
        errors = error.errors
    assert all(each.isprintable() for each in errors)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        read(path)
