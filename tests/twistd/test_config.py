"""
One way in: a command line and a file that say the same are the same `Config`.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from connlimit._twistd.command_line import Options
from connlimit._twistd.config import Config
from connlimit._twistd.config_file import read

LIMITER = "[limiters.web]\nmax_connections = 5\nwait_timeout = '1min 30s'\n"
LIMITS = ["--name=web", "--max-connections=5", "--wait-timeout=90"]


def of_arguments(*arguments: str, text: str | None = None) -> Config:
    options = Options(text)
    options.parseOptions(list(arguments))
    return options.described


def of_file(folder: Path, text: str) -> Config:
    """
    What the file says, with its service called as that of a command line is.
    """
    config = read(folder / "connlimit.toml", text)
    (service,) = config.services.values()
    (target,) = [each for each in ("forward", "factory", "plugin", "tac") if getattr(service, each)]
    name = service.plugin[0] if target == "plugin" else target
    return attrs.evolve(config, services={name: attrs.evolve(service, name=name)})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--listen=tcp:0", "--listen=tcp:0:interface=127.0.0.1", "--forward=tcp:localhost:9"],
            '[services.x]\nlisten = ["tcp:0", "tcp:0:interface=127.0.0.1"]\nforward = "tcp:localhost:9"\n',
        ),
        (
            [
                "--listen=tcp:0",
                "--forward=tcp:localhost:9",
                "--connect-timeout=500ms",
                "--send-proxy",
                "--when-full=stop-accepting",
                "--status=tcp:0",
                "--status-host=here.example",
                "--drain-timeout=2min",
                "--processes=3",
                "--worker-timeout=1m",
                "--log-connections",
            ],
            'drain_timeout = 120\nprocesses = 3\nworker_timeout = "60s"\nlog_connections = "yes"\n'
            '[services.x]\nlisten = "tcp:0"\nforward = "tcp:localhost:9"\nconnect_timeout = 0.5\n'
            'send_proxy = true\nwhen_full = "stop-accepting"\n'
            '[status]\nlisten = "tcp:0"\nhosts = "here.example"\n',
        ),
        (
            ["--skip=tcp:0", "web", "--listen=tcp:0", "--listen=tcp:8080"],
            '[services.x]\nplugin = ["web", "--listen=tcp:0", "--listen=tcp:8080"]\nskip = "tcp:0"\n',
        ),
    ],
)
def test_a_command_line_says_what_a_file_says(arguments: list[str], text: str, tmp_path: Path) -> None:
    keys, tables = text[: text.index("[")], text[text.index("[") :]
    assert of_arguments(*LIMITS, *arguments) == of_file(tmp_path, keys + LIMITER + tables)


def test_a_worker_has_the_text_that_its_parent_has_read_and_reads_no_file(tmp_path: Path) -> None:
    forward = ["--listen=tcp:0", "--forward=tcp:localhost:9"]
    config = of_arguments(*LIMITS, f"--shared-file={tmp_path}/absent", *forward, text="http://localhost:9/\n")
    assert config.limiters["web"].shared == "http://localhost:9/"
    text = LIMITER + '[services.x]\nlisten = "tcp:0"\nforward = "tcp:localhost:9"\n'
    config = of_arguments(f"--config={tmp_path}/absent", text=text)
    assert config.limiters["web"].settings.max_connections == 5


def test_with_nothing_to_limit_it_shows_how_it_works() -> None:
    config = of_arguments("--listen=tcp:0")
    assert config.summary() == [
        "limiter default: max_connections=2",
        "service demonstration: listens at tcp:0, shows how it works, behind limiter default",
    ]
