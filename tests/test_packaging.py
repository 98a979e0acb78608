"""
What is installed can be found by Twisted, however it is installed, and is gone when it is uninstalled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from twisted.application.service import IServiceMaker
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.plugin import getPlugins

from connlimit import __version__

ROOT = Path(__file__).parent.parent

#: What a Twisted program does to find us, run from a folder that has nothing to do with us.
DISCOVERY = """
from twisted.application.service import IServiceMaker
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.plugin import getPlugins
print({"connlimit", "connlimit-semaphores"} <= {plugin.tapname for plugin in getPlugins(IServiceMaker)})
try:
    print(type(serverFromString(reactor, "connlimit:tcp:0:max_connections=3")).__name__)
except ValueError:
    print("unknown")
"""


def test_this_installation_is_found() -> None:
    assert "connlimit" in [plugin.tapname for plugin in getPlugins(IServiceMaker)]
    assert "connlimit" in [plugin.prefix for plugin in getPlugins(IStreamServerEndpointStringParser)]


def test_the_version_in_code_is_that_of_the_installation() -> None:
    assert __version__ == version("connlimit")


def test_the_core_needs_three_packages_alone() -> None:
    needed = [line for line in requires("connlimit") if "extra ==" not in line]
    assert sorted(line.split(">")[0].split("<")[0].lower() for line in needed) == [
        "attrs",
        "twisted",
        "zope.interface",
    ]


class Environment:
    """
    A fresh virtual environment.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
        self.elsewhere = path / "elsewhere"
        self.elsewhere.mkdir()

    def run(self, program: str, *arguments: str, code: int = 0) -> str:
        """
        What a program of the environment prints, which must end with this exit code.
        """
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.path / "bin" / program), *arguments],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def install(self, *what: str) -> None:
        self.run("python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *what)

    def finds_connlimit(self) -> bool:
        """
        Whether Twisted finds all of it, or, if it says False, nothing.
        """
        listed, endpoint = self.run("python", "-c", DISCOVERY).split()
        in_help = "connlimit" in self.run("twistd", "--help")
        assert (listed, endpoint, in_help) in (
            ("True", "LimitingEndpoint", True),
            ("False", "unknown", False),
        )
        return in_help


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A copy of the source, since installing writes beside it.
    """
    copy = tmp_path_factory.mktemp("source") / "connlimit"
    leave_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_build")
    shutil.copytree(ROOT, copy, ignore=leave_out)
    return copy


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """
    An environment that has Twisted, and the tools to build packages.
    """
    environment = Environment(tmp_path_factory.mktemp("environment"))
    try:
        environment.install(f"Twisted=={version('Twisted')}", "build")
    except AssertionError as error:
        if os.environ.get("CONNLIMIT_REQUIRE_PROGRAMS"):
            raise
        pytest.skip(f"packages cannot be installed here: {error}")
    return environment


@pytest.fixture(scope="module")
def built(source: Path, environment: Environment) -> Path:
    """
    A folder with the source distribution, and the wheel that was made of it.
    """
    environment.run("python", "-m", "build", "--outdir", str(source / "dist"), str(source))
    return source / "dist"


def test_twisted_finds_it_after_every_kind_of_installation_and_not_after_its_end(
    source: Path, built: Path, environment: Environment
) -> None:
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert not environment.finds_connlimit()
    for what in ([str(source)], ["--editable", str(source)], [str(wheel)], [str(archive)]):
        environment.install(*what)
        assert environment.finds_connlimit(), what
        environment.run("python", "-m", "pip", "--quiet", "uninstall", "--yes", "connlimit")
        assert not environment.finds_connlimit(), what


#: Every module that needs no extra, and what those say that do.
CORE_ALONE = """
import importlib, pkgutil, connlimit
for module in pkgutil.walk_packages(connlimit.__path__, "connlimit."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
try:
    from connlimit.semaphores import Semaphores
    Semaphores("http://localhost:8000")
    Semaphores("https://localhost:8000")
except ValueError as error:
    print(error)
"""


def test_the_core_alone_works_and_says_which_extra_it_lacks(built: Path, environment: Environment) -> None:
    (wheel,) = built.glob("*.whl")
    environment.install(str(wheel))
    try:
        lacking = environment.run("python", "-c", CORE_ALONE).splitlines()
        assert lacking.pop() == "url with https needs pyOpenSSL: pip install 'connlimit[tls]'"
        assert dict(line.split() for line in lacking) == {
            "connlimit._redis.client": "txredisapi",
            "connlimit._redis.address": "txredisapi",
            "connlimit.shared.redis_limit": "txredisapi",
            "connlimit._redis.asker": "txredisapi",
            "connlimit._redis.connections": "txredisapi",
            "connlimit._redis.link": "txredisapi",
            "connlimit._redis.sentinel": "txredisapi",
            "connlimit.metrics": "prometheus_client",
            "connlimit.status.metrics": "prometheus_client",
            "connlimit._twistd.semaphores.program": "httptools",
            "connlimit.semaphores.server.http.connection": "httptools",
            "connlimit.semaphores.server.http.reading": "httptools",
            "connlimit.semaphores.server.redis_store": "txredisapi",
            "connlimit.semaphores.server.site": "httptools",
        }
        assert "--max-connections" in environment.run("twistd", "connlimit", "--help")
        assert "--max-peers" in environment.run("twistd", "connlimit-semaphores", "--help")
        assert "reset" in environment.run("connlimit-shared", "--help")
        said = environment.run("connlimit-shared", "list", code=2)
        assert said == "connlimit-shared: this needs txredisapi: pip install 'connlimit[redis]'\n"
        for arguments, extra in (
            (["connlimit", "--max-connections=1", "--shared=redis://localhost"], "redis"),
            (["connlimit", "--shared=https://localhost:8000"], "tls"),
            (["connlimit-semaphores"], "semaphores"),
            (["connlimit-semaphores", "--store=redis://localhost"], "redis"),
        ):
            said = environment.run("twistd", "-n", "--pidfile=", *arguments, code=1)
            assert f"pip install 'connlimit[{extra}]'" in said
            assert len(said.splitlines()) == 1
    finally:
        environment.run("python", "-m", "pip", "--quiet", "uninstall", "--yes", "connlimit")


def test_the_wheel_holds_the_package_and_the_plugin_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src" / "connlimit").rglob("*.py")
    }
    assert names == package | {
        "connlimit/shared/lease.lua",
        "connlimit/_twistd/targets/demonstration.xml",
        "connlimit/py.typed",
        "connlimit/semaphores/server/log.lua",
        "connlimit/semaphores/server/static/welcome.xml",
        *(f"connlimit/status/static/{name}.xml" for name in ("bar", "chart", "page", "section", "table")),
        "connlimit/status/static/status.css",
        "connlimit/status/static/status.js",
        "twisted/plugins/connlimit_plugin.py",
    }
