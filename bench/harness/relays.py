"""
Other programs that stand in front of a server, as they are set up here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness.processes import Process, free_port, missing, program, script

#: More than any load connects.
CROWD = 1000

_HAPROXY = """
global
    nbthread 1
    maxconn {crowd}
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
    timeout queue 1m
listen relay
    bind 127.0.0.1:{port}
    server backend 127.0.0.1:{backend} maxconn {crowd}
"""

_NGINX = """
load_module {module};
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{
    worker_connections {crowd};
}}
stream {{
    limit_conn_zone $server_port zone=all:1m;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        limit_conn all {crowd};
        proxy_pass 127.0.0.1:{backend};
    }}
}}
"""


def _haproxy(port: int, backend: int, folder: Path) -> list[str]:
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, backend=backend, crowd=CROWD))
    return [program("haproxy"), "-f", str(config)]


# Where Debian has it.
_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def _nginx(port: int, backend: int, folder: Path) -> list[str]:
    command = [program("nginx"), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    if not _STREAM.exists():
        raise missing("nginx's stream module")
    config = _NGINX.format(module=_STREAM, port=port, backend=backend, folder=folder, crowd=CROWD)
    (folder / "nginx.conf").write_text(config)
    return [*command, "-p", str(folder), "-g", "daemon off;"]


def _socat(port: int, backend: int, folder: Path) -> list[str]:
    listen = f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,backlog=4096"
    return [program("socat"), listen, f"TCP:127.0.0.1:{backend}"]


def _portforward(port: int, backend: int, folder: Path) -> list[str]:
    listen = f"tcp:{port}:interface=127.0.0.1:backlog=4096"
    options = ["--port", listen, "--host", "127.0.0.1", "--dest_port", str(backend)]
    return [*_twistd(folder), "portforward", *options]


def _connlimit(port: int, backend: int, folder: Path) -> list[str]:
    options = ["--listen", f"tcp:{port}:interface=127.0.0.1", "--forward", f"tcp:127.0.0.1:{backend}"]
    return [*_twistd(folder), "connlimit", *options, "--max-connections", str(CROWD)]


def _twistd(folder: Path) -> list[str]:
    return [script("twistd"), "--nodaemon", "--pidfile=", f"--logfile={folder / 'twistd.log'}"]


#: The command that relays from a port to another.
COMMANDS: dict[str, Callable[[int, int, Path], list[str]]] = {
    "connlimit": _connlimit,
    "HAProxy": _haproxy,
    "nginx": _nginx,
    "twistd portforward": _portforward,
    "socat": _socat,
}


@contextmanager
def relay(name: str, backend: int) -> Iterator[Process]:
    """
    A relay to the backend's port that limits to `CROWD`, as far as it limits.

    :raises bench.harness.processes.Missing: if it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        with Process(COMMANDS[name](port, backend, Path(folder)), port=port) as process:
            yield process
