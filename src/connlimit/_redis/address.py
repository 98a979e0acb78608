"""
Where a Redis is, by its URL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import attrs
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint

from connlimit._redis.client import connect
from connlimit._redis.sentinel import SentinelEndpoint
from connlimit._system.files import contents
from connlimit._system.urls import masked

_TIMEOUT = 2  # seconds until a connection is there

#: The parameters that can follow a ``?`` with each scheme; those of a limit with all.
OF_A_LIMIT = ("ttl", "when_unreachable")
_PARAMETERS = {
    "redis": ("password_file",),
    "redis+sentinel": ("password_file", "sentinel_username", "sentinel_password", "sentinel_password_file"),
    "rediss": ("password_file", "ssl_ca_certs"),
    "unix": ("password_file", "db"),
}

#: The variables of the environment with passwords that a URL does not have.
PASSWORD, SENTINEL_PASSWORD = "CONNLIMIT_REDIS_PASSWORD", "CONNLIMIT_SENTINEL_PASSWORD"

_PORT, _SENTINEL_PORT = 6379, 26379


@attrs.frozen
class RedisAddress:
    """
    Where a Redis is, and how it is asked.
    """

    host: str | None
    port: int
    path: str | None
    database: int
    username: str | None
    password: str | None = attrs.field(repr=False)
    tls: bool
    ca: str | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = attrs.field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str) -> RedisAddress:
        """
        The address that a URL describes:

        - ``redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]``;
        - ``rediss://…``, the same with TLS. The certificate must be for HOST, and by an authority that the
          platform trusts or, with ``?ssl_ca_certs=FILE``, one of those in that PEM file;
        - ``unix://[[USER]:PASSWORD@]/PATH[?db=DATABASE]``;
        - ``redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DATABASE]``: the primary
          of a service, by its sentinels. If these demand a password themselves,
          ``?sentinel_password=…&sentinel_username=…``, or ``?sentinel_password_file=FILE``.

        The password can also be the first line of a file, ``?password_file=FILE``, or, if the URL names
        none, that of the environment: ``CONNLIMIT_REDIS_PASSWORD``, and ``CONNLIMIT_SENTINEL_PASSWORD``.

        A limit's ``ttl`` and ``when_unreachable`` can be given as parameters with each.

        :raises ValueError: if it describes none.
        """
        try:
            parts = urlsplit(url)
            parameters = url_parameters(url)
            user, _, hosts = parts.netloc.rpartition("@")
            username, _, password = user.partition(":")
            where = _PLACES[parts.scheme](parts, hosts, parameters)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(
                "url must name a Redis, such as redis://localhost:6379/0 or unix:///run/redis.sock, "
                f"not {masked(url)!r}"
            ) from None
        known = {*OF_A_LIMIT, *_PARAMETERS[parts.scheme]}
        for name, value in parameters.items():
            if name not in known:
                shown = "***" if "pass" in name else value
                raise ValueError(
                    f"url can have the parameters {', '.join(sorted(known))}, not {name}={shown}"
                )
        given = {
            name.removeprefix("sentinel_"): text for name, text in parameters.items() if "sentinel_" in name
        }
        return cls(
            **{"host": None, "port": _PORT, "path": None, "tls": False} | where,
            username=unquote(username) or None,
            password=unquote(password) or _password(parameters, "password_file", PASSWORD),
            sentinel_username=given.get("username") or None,
            sentinel_password=given.get("password")
            or (
                _password(parameters, "sentinel_password_file", SENTINEL_PASSWORD)
                if "service" in where
                else None
            ),
        )

    def endpoint(self, reactor: Any) -> IStreamClientEndpoint:
        """
        The endpoint to connect to.

        :raises ValueError: if TLS is not installed, or the file of the authorities is not to be used.
        """
        if self.path is not None:
            return UNIXClientEndpoint(reactor, self.path, timeout=_TIMEOUT)
        if self.service is not None:
            return SentinelEndpoint(
                reactor,
                self.sentinels,
                self.service,
                _TIMEOUT,
                self.sentinel_username,
                self.sentinel_password,
            )
        tcp = HostnameEndpoint(reactor, str(self.host), self.port, timeout=_TIMEOUT)
        if not self.tls:
            return tcp
        try:
            from twisted.internet.ssl import optionsForClientTLS
        except ImportError:
            raise ValueError("a rediss url needs pyOpenSSL: pip install 'connlimit[redis,tls]'") from None
        trust = None if self.ca is None else _authorities(self.ca)
        secure: IStreamClientEndpoint = wrapClientTLS(optionsForClientTLS(str(self.host), trust), tcp)
        return secure

    def connector(self, reactor: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
        """
        What makes connections, as `connlimit._redis.client.connect` does.

        :raises ValueError: as `endpoint` does.
        """
        return partial(
            connect,
            self.endpoint(reactor),
            username=self.username,
            password=self.password,
            database=self.database,
        )

    def __str__(self) -> str:
        if self.service is not None:
            return f"{self.service} of {', '.join(f'{host}:{port}' for host, port in self.sentinels)}"
        return self.path or f"{self.host}:{self.port}"


def url_parameters(url: str) -> Mapping[str, str]:
    """
    What follows the ``?`` of a URL.
    """
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def _password(parameters: Mapping[str, str], name: str, variable: str) -> str | None:
    """
    The password in the file that a parameter names, or that of the environment.
    """
    file = parameters.get(name)
    if file is None:
        return os.environ.get(variable) or None
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    if not lines or not lines[0]:
        raise ValueError(f"{name} must be a file with a password in its first line, not {file!r}")
    return lines[0]


def _host_and_port(text: str, default: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(text)
    return parts.hostname, parts.port or default


def _database(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _tcp(parts: SplitResult, hosts: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    host, port = _host_and_port(hosts, _PORT)
    return {"host": host, "port": port, "database": _database(parts.path.strip("/") or "0")}


def _tls(parts: SplitResult, hosts: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    return _tcp(parts, hosts, parameters) | {"tls": True, "ca": parameters.get("ssl_ca_certs")}


def _unix(parts: SplitResult, hosts: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    if hosts or not parts.path:
        raise ValueError(parts.path)
    return {"path": unquote(parts.path), "database": _database(parameters.get("db", "0"))}


def _sentinel(parts: SplitResult, hosts: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError(parts.path)
    sentinels = tuple(_host_and_port(each, _SENTINEL_PORT) for each in hosts.split(","))
    return {"sentinels": sentinels, "service": unquote(service), "database": _database(database or "0")}


_PLACES = {"redis": _tcp, "rediss": _tls, "unix": _unix, "redis+sentinel": _sentinel}


def _authorities(file: str) -> Any:
    """
    Trust in those whose certificates a PEM file has.
    """
    from OpenSSL.crypto import Error
    from twisted.internet.ssl import Certificate, trustRootFromCertificates

    end = b"-----END CERTIFICATE-----"
    try:
        pems = [each + end for each in contents(Path(file)).split(end)[:-1]]
        certificates = [Certificate.loadPEM(pem) for pem in pems]
    except (OSError, ValueError, Error):
        certificates = []
    if not certificates:
        raise ValueError(f"ssl_ca_certs must be a file of certificates in PEM, not {file!r}")
    return trustRootFromCertificates(certificates)
