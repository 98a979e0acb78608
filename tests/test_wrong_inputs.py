"""
Whatever is wrong gets one sentence, in each of the four ways in, and nothing is started.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.applications import ECHO, TAC
from support.fakes import RecordingFactory
from support.settings import VALUES
from twisted.internet import reactor
from twisted.internet.endpoints import quoteStringArgument, serverFromString

from connlimit import LimitedService, Limiter, LimitingEndpoint, LimitingFactory
from connlimit._twistd.command_line import Options, makeService
from connlimit._twistd.config import Spelling
from connlimit._twistd.config_file import read
from connlimit._twistd.program import CannotStart
from connlimit._twistd.semaphores.command_line import Options as SemaphoresOptions
from connlimit._twistd.services.parts import check
from connlimit._twistd.toml import ConfigError

#: What must not be seen by somebody who writes no Python.
PYTHON = (
    r"Traceback|\bNone\b|\bTrue\b|\bFalse\b|IRefusal|callable|positional|keyword|object at|[ (]b'|[a-z]\(\)"
)


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """
    Listening and connecting are not possible, and the current directory is empty.
    """
    tried: list[str] = []
    for name in ("listenTCP", "listenUNIX", "listenSSL", "adoptStreamPort", "connectTCP", "spawnProcess"):
        monkeypatch.setattr(
            reactor, name, lambda *args, name=name, **kwargs: tried.append(name), raising=False
        )
    monkeypatch.chdir(tmp_path)
    yield
    assert tried == []


def one_sentence(sentence: str, words: str) -> None:
    assert words in sentence, sentence
    assert len(sentence.splitlines()) == 1
    assert not re.search(PYTHON, sentence), sentence


#: Settings that make the others of a table complete.
LIMIT = {"max_connections": "1"}

WRONG = [(name, text) for name, (_, _, _, texts) in VALUES.items() for text in texts]


# The command line


def refused(*arguments: str, options: type[Options | SemaphoresOptions] = Options) -> str:
    """
    The sentence with which the program ends.
    """
    with pytest.raises(CannotStart) as caught:
        parsed = options()
        parsed.parseOptions(list(arguments))
        makeService(parsed)
    assert isinstance(caught.value.code, str)  # so the process ends with 1
    program, _, sentence = str(caught.value).partition(": ")
    assert program == options.program
    return sentence


FORWARD = ("--listen=tcp:0", "--forward=tcp:localhost:9")


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_wrong_setting_on_the_command_line(name: str, text: str) -> None:
    option = f"--{name.replace('_', '-')}"
    given = () if name == "max_connections" else ("--max-connections=1",)
    one_sentence(refused(*FORWARD, *given, f"{option}={text}"), f"{option} must be ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-conections=5"], "option --max-conections not recognized; did you mean --max-connections?"),
        (["--maxconnections=5"], "did you mean --max-connections?"),
        (["--statuss=tcp:1"], "did you mean --status?"),
        (["--max-connections"], "--max-connections requires argument"),
        (["--max=5"], "--max not a unique prefix"),
        (["--log-connections=yes"], "--log-connections must not have an argument"),
        (["--utterly-unknown"], "option --utterly-unknown not recognized"),
        (["-x"], "option -x not recognized"),
        (["wbe"], "there is no twistd plugin wbe; did you mean web?"),
        (["connlimit"], "there is no twistd plugin connlimit"),
        (["tcp:8080"], "there is no twistd plugin tcp:8080"),
        ([""], "there is no twistd plugin"),
        (["web", "--max-connections=5"], "option --max-connections not recognized; it must stand before web"),
        (["web", "--pathh=."], "option --pathh not recognized; did you mean --path?"),
        (
            ["--max-connections=1", "web", "--listen=tcp:port"],
            "web cannot be made with these options: 'port' is no",
        ),
        (
            ["--listen=tcp:0", "--forward=tcp:localhost:9"],
            "nothing would be limited: give --max-connections,",
        ),
        (["--max-waiting=5", "web"], "nothing would be limited"),
        (["--dry-run=yes", *FORWARD], "nothing would be limited"),
        ([*FORWARD, "--max-rate=5", "--max-burst=0"], "--max-burst must be a whole number, 1 or more"),
        ([*FORWARD, "--max-connections=1", "--max-burst=5"], "--max-burst needs --max-rate"),
        ([*FORWARD, "--max-rate=1", "--shared=redis://localhost"], "--shared needs --max-connections"),
        ([*FORWARD, "--max-connections=1", "--shared=nonsense"], "--shared must name a Redis"),
        ([*FORWARD, "--max-connections=1", "--shared="], "--shared must name a Redis"),
        ([*FORWARD, "--max-connections=1", "--shared=http://"], "--shared must name a server of semaphores"),
        ([*FORWARD, "--max-connections=1", "--shared=redis://localhost/x"], "--shared must name a Redis"),
        ([*FORWARD, "--max-connections=1", "--processes=0"], "--processes must be a whole number from 1 to"),
        (
            [*FORWARD, "--max-connections=1", "--processes=two"],
            "--processes must be a whole number from 1 to",
        ),
        (
            [*FORWARD, "--max-connections=1", "--drain-timeout=-1"],
            "--drain-timeout must be a time of 0 or more, such as 30",
        ),
        (
            [*FORWARD, "--max-connections=1", "--drain-timeout="],
            "--drain-timeout must be a time of 0 or more, such as 30",
        ),
        (
            [*FORWARD, "--max-connections=1", "--drain-timeout=inf"],
            "--drain-timeout must be a time of 0 or more, such as 30",
        ),
        ([*FORWARD, "--max-connections=1", "--when-full=stop-acepting"], "did you mean stop-accepting?"),
        ([*FORWARD, "--max-connections=1", "--when-full="], "--when-full must be refuse or stop-accepting"),
        ([*FORWARD, "--max-connections=1", "--status="], "--status must be an endpoint such as"),
        (
            [*FORWARD, "--max-connections=1", "--status=tcp:70000"],
            "a port must be from 0 to 65535, not 70000",
        ),
        ([*FORWARD, "--max-connections=1", "--factory=a:b"], "only one of --forward and --factory"),
        ([*FORWARD, "--max-connections=1", "--check-config"], "--check-config needs --config FILE"),
        (["--forward=tcp:localhost:9"], "--forward needs --listen, such as --listen tcp:8080"),
        (["--listen=tcp:0", "--forward="], "--forward must be an endpoint such as tcp:localhost:9000"),
        (["--listen=tcp:0", "--forward=9000"], "there is not an endpoint '9000'"),
        (["--listen=tcp:0", "--forward=tpc:h:9"], "there is not an endpoint 'tpc'); did you mean tcp?"),
        (["--listen=tcp:0", "--forward=tcp:localhost"], "its port is missing"),
        (["--listen=tcp:0", "--forward=tcp::9"], "the host is missing"),
        (["--listen=tcp:0", "--forward=tcp:h:0"], "a port must be from 1 to 65535, not 0"),
        (["--listen=tcp:0", "--forward=tcp:h:99999"], "a port must be from 1 to 65535, not 99999"),
        (["--listen=tcp:0", "--forward=tcp:h:-1"], "a port must be from 1 to 65535, not -1"),
        (["--listen=tcp:0", "--forward=tls:h:99999"], "a port must be from 1 to 65535, not 99999"),
        (["--listen=tcp:0", "--forward=tcp:h:http"], "'http' is not a number"),
        (["--listen=tcp:0", "--forward=tcp:h:9:color=red"], "it takes no color"),
        (["--listen=tcp:0", f"--forward=unix:/{'x' * 200}"], "the path must have 107 bytes at most"),
        (["--listen=tcp:0", "--factory="], "--factory must be MODULE:NAME"),
        (["--listen=tcp:0", "--factory=os:nothing"], "--factory os:nothing failed"),
        (["--listen=tcp:0", "--factory=os:getcwd"], "--factory must name a factory"),
        (["--config="], "the file cannot be read"),
        (["--config=absent.toml"], "absent.toml: the file cannot be read"),
        (
            ["--config=absent.toml", "--max-connections=5"],
            "with --config, --max-connections must be in the file",
        ),
        (["--config=absent.toml", "--skip=tcp:1"], "with --config, --skip must be in the file"),
        (["--config=absent.toml", "web"], "with --config, web must be in the file"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], words: str) -> None:
    one_sentence(refused(*arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tac=absent.tac"], "--tac absent.tac cannot be read: No such file or directory"),
        (["--tac=."], "--tac . cannot be read: Is a directory"),
        (["--tac=empty.tac"], "--tac empty.tac failed: it has no application"),
        (["--tac=failing.tac"], "--tac failing.tac failed: RuntimeError: not today, nor tomorrow"),
        (["--tac=wrong.tac"], "--tac wrong.tac failed: SyntaxError: "),
        (["--tac=ending.tac"], "--tac ending.tac failed: SystemExit: 5"),
        (["--tac=number.tac"], "--tac number.tac failed: "),
        (["--tac=idle.tac"], "idle.tac has no service that listens, so there is nothing to limit"),
        (
            ["--tac=echoes.tac", "--skip=tcp:7"],
            "--skip must say where something listens (tcp:0:interface=127.0.0.1, unix:",
        ),
        (["--tac=echoes.tac", "--skip=tpc:7"], "--skip must be an endpoint such as tcp:8080, not 'tpc:7'"),
        (
            ["--tac=echoes.tac", "--skip=tcp:0", "--skip=unix:{echo}/admin"],
            "--skip leaves nothing of echoes.tac to limit",
        ),
        (["--tac=echoes.tac", "--listen=tcp:0"], "--listen must be left out with --tac"),
        (
            ["--tac=echoes.tac", "--when-full=stop-accepting"],
            "--when-full must be refuse, not stop-accepting",
        ),
        (["--tac=echoes.tac", "web"], "only one of --tac and web can be limited"),
        (["--listen=tcp:0", "--forward=tcp:h:1", "--skip=tcp:0"], "--skip needs a plugin or --tac"),
        (
            ["--skip=tcp:7", "web", "--listen=tcp:0"],
            "--skip must say where something listens (tcp:0), not 'tcp:7'",
        ),
    ],
)
def test_an_application_that_cannot_be_limited(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # what is done to the path is undone at the end
    monkeypatch.delitem(sys.modules, "echo_server", raising=False)
    (tmp_path / "echo_server.py").write_text(ECHO)
    files = {
        "echoes": TAC.replace("UID", "65534"),
        "empty": "",
        "failing": "raise RuntimeError('not today,\\nnor tomorrow')",
        "wrong": "application =",
        "ending": "raise SystemExit(5)",
        "number": "application = 5",
        "idle": "from twisted.application.service import Application\napplication = Application('idle')",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.tac").write_text(text)
    arguments = [each.replace("{echo}", str(tmp_path)) for each in arguments]
    one_sentence(refused("--max-connections=1", *arguments), words)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("", "there is not an endpoint ''"),
        ("8080", "there is not an endpoint '8080'"),
        ("tpc:8080", "there is not an endpoint 'tpc'); did you mean tcp?"),
        ("tcp", "its port is missing"),
        ("tcp:http", "'http' is not a number"),
        ("tcp:70000", "a port must be from 0 to 65535, not 70000"),
        ("tcp:-1", "a port must be from 0 to 65535, not -1"),
        ("tcp6:65536", "a port must be from 0 to 65535, not 65536"),
        ("haproxy:tcp:70000", "a port must be from 0 to 65535, not 70000"),
        ("connlimit:tcp:70000:max_connections=1", "a port must be from 0 to 65535, not 70000"),
        ("connlimit:tcp:0", "nothing would be limited"),
        ("tcp:0:interface=no.such.host.invalid", "the interface must be an address of this machine"),
        ("tcp:0:1:2:3:4", "there is too much in it"),
        ("tcp:0:backlog=many", "'many' is not a number"),
        ("tcp:0:backlog=-1", "the backlog must be 0 or more, and not -1"),
        ("tcp:0:nonsense=5", "it takes no nonsense"),
        ("tcp:0:interfaces=127.0.0.1", "it takes no interfaces"),
        ("tcp\\", "it ends with a backslash"),
        ("unix:", "the path is missing"),
        ("unix:/x:mode=999", "'999' is not a number"),
        (f"unix:/{'x' * 200}", "the path must have 107 bytes at most"),
        ("ssl:0:privateKey=absent.pem", "No such file or directory: "),
        ("systemd:domain=INET:index=7", "there is no such socket"),
    ],
)
def test_a_wrong_endpoint(endpoint: str, words: str, tmp_path: Path) -> None:
    one_sentence(refused(f"--listen={endpoint}", "--forward=tcp:h:9", "--max-connections=1"), words)
    one_sentence(refused(f"--status={endpoint}", *FORWARD, "--max-connections=1"), words)
    quoted = endpoint.replace("\\", r"\\")
    text = f'[limiters.a]\nmax_connections = 1\n[services.a]\nlisten = "{quoted}"\nforward = "tcp:h:9"\n'
    if endpoint:
        one_sentence(
            refused_file(tmp_path, text), "[services.a] listen must be an endpoint such as tcp:8080, not "
        )
        assert words in refused_file(tmp_path, text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-peers=0"], "--max-peers must be a whole number, 1 or more, not '0'"),
        (["--max-peer=0"], "--max-peers must be a whole number"),
        (["--listn=tcp:1"], "option --listn not recognized; did you mean --listen?"),
        (["throttle.toml"], "throttle.toml is not an option; options begin with --"),
        (["--config=absent.toml"], "absent.toml: the file cannot be read"),
        (["--grace=long"], "--grace must be a time of 0 or more, such as 30, 500ms, 30s or 5min, not 'long'"),
        (["--store=nonsense"], "--store must name a Redis"),
        (["--listen=tcp:70000"], "a port must be from 0 to 65535"),
        (["--status=tcp:-1"], "a port must be from 0 to 65535"),
    ],
)
def test_a_wrong_command_line_of_the_semaphores(arguments: list[str], words: str) -> None:
    one_sentence(refused(*arguments, options=SemaphoresOptions), words)


# A file


def refused_file(folder: Path, text: str) -> str:
    """
    The one thing that is wrong with a file.
    """
    path = folder / "connlimit.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check(read(path), Spelling(path), reactor)
    (sentence,) = caught.value.errors
    return sentence.removeprefix(f"{path}: ")


SERVICE = '[services.a]\nlisten = "tcp:0"\nforward = "tcp:h:9"\n'


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text in WRONG if name != "name"])
def test_a_wrong_setting_of_a_file(name: str, text: str, tmp_path: Path) -> None:
    quoted = text.replace("\\", r"\\")
    rate = "max_rate = 1\n" if name != "max_rate" else ""
    file = f'[limiters.a]\n{rate}{name} = "{quoted}"\n{SERVICE}'
    one_sentence(refused_file(tmp_path, file), f"[limiters.a] {name} must be ")


LIMITER = "[limiters.a]\nmax_connections = 1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "limiters must be at least one table, such as [limiters.web], and is missing"),
        ("limiters = 1", "limiters must be tables, not 1"),
        ("[limiters", "this is not TOML"),
        ("[limiters.a]\n" + SERVICE, "[limiters.a] nothing would be limited: give max_connections,"),
        ("[limiters.a]\nmax_connections = true\n" + SERVICE, "or none for no limit, not true"),
        ("[limiters.a]\nmax_connections = 1.5\n" + SERVICE, "not 1.5"),
        ("[limiters.a]\nmax_connections = [1]\n" + SERVICE, "not [1]"),
        ("[limiters.a]\nmax_connections = {a = 1}\n" + SERVICE, "not {a = 1}"),
        ("[limiters.a]\nmax_connections = 2026-01-01\n" + SERVICE, "not 2026-01-01"),
        (
            "[limiters.a]\nmax_conections = 1\n" + SERVICE,
            "max_conections is not known; did you mean max_connections?",
        ),
        (LIMITER + "max_burst = 5\n" + SERVICE, "[limiters.a] max_burst needs max_rate"),
        (LIMITER + "exempt = ['10.0.0.1/8']\n" + SERVICE, "did you mean 10.0.0.0/8?"),
        (
            LIMITER + "exempt = [5]\n" + SERVICE,
            "exempt must be IP networks, such as 127.0.0.0/8,::1, or none, not [5]",
        ),
        (LIMITER + "notice = [5]\n" + SERVICE, "notice must be a time above 0 and what is said then"),
        (LIMITER + "notice = 5\n" + SERVICE, "notice must be a time above 0 and what is said then"),
        (LIMITER + "dry_run = 1\n" + SERVICE, "dry_run must be yes or no, true or false, not 1"),
        (LIMITER + "refusal = 5\n" + SERVICE, "refusal must be close, reset, http,"),
        (LIMITER + "shared = 'nonsense'\n" + SERVICE, "[limiters.a] shared must name a Redis"),
        (LIMITER + "shared = 5\n" + SERVICE, "shared must be the URL of a Redis"),
        (LIMITER, "services must be at least one table"),
        (
            LIMITER + "[services.a]\nlisten = 'tcp:0'\n",
            "needs one of forward, factory, plugin and tac, not none",
        ),
        (LIMITER + SERVICE + "factory = 'a:b'\n", "not forward and factory"),
        (LIMITER + "[services.a]\nforward = 'tcp:h:9'\n", "listen is missing"),
        (LIMITER + "[services.a]\nplugin = 'wbe'\n", "there is no twistd plugin wbe"),
        (LIMITER + "[services.a]\nplugin = ['web', '--nonsense']\n", "option --nonsense not recognized"),
        (LIMITER + "[services.a]\nplugin = ['procmon', 'true']\n", "procmon"),
        (
            LIMITER + "[services.a]\nplugin = 'web'\nskip = 'tcp:9'\n",
            "skip must say where something listens (tcp:8080)",
        ),
        (
            LIMITER + "[services.a]\ntac = 'absent.tac'\n",
            "tac absent.tac cannot be read: No such file or directory",
        ),
        (LIMITER + "[services.a]\ntac = 5\n", "tac must be the path of a .tac file, not 5"),
        (LIMITER + SERVICE + "skip = 'tcp:9'\n", "skip must be left out without plugin or tac"),
        (LIMITER + SERVICE + "limiter = 'b'\n", "limiter must be the name of a limiter (a), not 'b'"),
        (
            LIMITER + SERVICE + "when_full = 'stop'\n",
            "when_full must be refuse or stop-accepting, not 'stop'",
        ),
        (LIMITER + "[services.a]\nlisten = 'tcp:0'\nforward = 'tcp:h:99999'\n", "from 1 to 65535, not 99999"),
        (LIMITER + "[services.a]\nlisten = 'tcp:0'\nfactory = 'nowhere:x'\n", "factory nowhere:x failed"),
        (LIMITER + SERVICE + "[status]\n", "[status] listen must be an endpoint"),
        (LIMITER + SERVICE + "[status]\nlisten = 'tcp:70000'\n", "[status] listen must be an endpoint"),
        (
            "drain_timeout = 'soon'\n" + LIMITER + SERVICE,
            "drain_timeout must be a time of 0 or more, such as 30, 500ms, 30s or 5min, not 'soon'",
        ),
        ("processes = 0\n" + LIMITER + SERVICE, "processes must be a whole number from 1 to"),
    ],
)
def test_a_wrong_file(text: str, words: str, tmp_path: Path) -> None:
    one_sentence(refused_file(tmp_path, text), words)


# An endpoint string


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text in WRONG if name != "name"])
def test_a_wrong_setting_of_an_endpoint_string(name: str, text: str) -> None:
    rate = "max_rate=1:" if name != "max_rate" else ""
    with pytest.raises(ValueError, match=r"\Aconnlimit endpoint: ") as caught:
        serverFromString(reactor, f"connlimit:tcp:0:{rate}{name}={quoteStringArgument(text)}")
    one_sentence(str(caught.value), f"{name} must be ")


# Code


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Limiter(max_conections=5), "max_conections is not a setting; did you mean max_connections?"),
        (lambda: Limiter(5, max_burst=5), "max_burst needs max_rate"),
        (lambda: Limiter(max_per_peer=0), "max_per_peer must be a whole number, 1 or more, or None"),
        (
            lambda: Limiter(notice=(5, b"")),
            "notice must be seconds above 0 and what is said then, such as (5, b'",
        ),
        (lambda: Limiter(exempt=["10.0.0.1/8"]), "did you mean 10.0.0.0/8?"),
        (lambda: Limiter(clock=5), "clock must provide IReactorTime"),
        (lambda: Limiter(5).reconfigure(max_waiting="5"), "max_waiting must be a whole number"),
        (lambda: LimitingFactory(5, Limiter(1)), "5"),
        (lambda: LimitingFactory(RecordingFactory(), 5), "5"),
        (
            lambda: LimitingEndpoint(None, Limiter(1), "stop"),
            "when_full must be refuse or stop-accepting, not 'stop'",
        ),
        (
            lambda: LimitedService(None, RecordingFactory(), Limiter(1), -1),
            "drain_timeout must be a number of",
        ),
    ],
)
def test_wrong_code(make: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
