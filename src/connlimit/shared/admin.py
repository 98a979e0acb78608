"""
Lists, sets and resets the limits that processes share: ``connlimit-shared``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import react

from connlimit._limiter.values import COUNT
from connlimit._system.version import __version__
from connlimit.shared.by_url import read_url, renamed

if TYPE_CHECKING:
    from connlimit._redis.address import RedisAddress

_TIMEOUT = 5  # seconds


class _Parser(argparse.ArgumentParser):
    """
    A parser that says what is wrong in one sentence, as our other programs do.
    """

    def error(self, message: str) -> NoReturn:
        """
        Exit with the sentence.
        """
        self.exit(2, f"connlimit-shared: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Carry out what the command line says.

    Exits with 0; with 1 if Redis does not answer; with 2 if the command line is wrong, or txredisapi missing.
    """
    parser = _Parser(
        prog="connlimit-shared",
        description="Lists and changes the limits that processes share through a Redis.",
        epilog="Example: connlimit-shared --url redis://localhost set database 300",
    )
    parser.add_argument(
        "--url", default="redis://localhost", help="the URL of the Redis [default: %(default)s]"
    )
    parser.add_argument("--url-file", metavar="FILE", help="read the URL, with its password, from this file")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="show who holds how many slots of which limit")
    command = commands.add_parser("set", help="change a limit for all processes at once")
    command.add_argument("name", metavar="NAME", help="the name of the limit")
    command.add_argument("slots", metavar="N", help="how many slots it has, in all processes together")
    command = commands.add_parser(
        "reset", help="make Redis forget a limit; each process reports again what it holds"
    )
    command.add_argument("name", metavar="NAME", help="the name of the limit")
    options = parser.parse_args(arguments)
    try:
        slots = COUNT.of_text("N", options.slots) if options.command == "set" else 0
    except ValueError as error:
        parser.error(str(error))
    if options.command != "list" and not options.name:
        parser.error("NAME must be that of a limit, not ''")
    try:
        from connlimit._redis.address import RedisAddress
        from connlimit.shared.redis_limit import is_text

        if options.command != "list" and not is_text(options.name):
            parser.error(f"NAME must be a text that can be written in UTF-8, not {options.name!r}")
        if options.url_file is not None:
            options.url = read_url(options.url_file, lambda _: "--url-file")
        address = RedisAddress.from_url(options.url)
    except ImportError:
        parser.error("this needs txredisapi: pip install 'connlimit[redis]'")
    except ValueError as error:
        parser.error(renamed(error, "--url"))
    react(lambda reactor: ensureDeferred(_carry_out(reactor, options, slots, address)))


async def _carry_out(reactor: Any, options: argparse.Namespace, slots: int, address: RedisAddress) -> None:
    from connlimit._redis.client import describe
    from connlimit.shared.redis_limit import keys_of, set_slots

    try:
        redis = await _soon(reactor, Deferred.fromCoroutine(address.connector(reactor)()))
        if options.command == "list":
            for line in await _lines(reactor, redis):
                print(line)
        elif options.command == "set":
            await _soon(reactor, set_slots(redis, options.name, slots))
        else:
            await _soon(reactor, redis.delete(keys_of(options.name)))
    except Exception as error:
        print(
            f"connlimit-shared: Redis at {address} cannot be used: {describe(error)}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


async def _soon(reactor: Any, deferred: Deferred[Any]) -> Any:
    return await deferred.addTimeout(_TIMEOUT, reactor)


async def _lines(reactor: Any, redis: Any) -> list[str]:
    """
    The limits and their members, a line each.
    """
    from connlimit.shared.redis_limit import LEASE, PREFIX, SLOTS, keys_of

    names = set()
    cursor: Any = 0
    while True:
        # A page at a time: Redis does nothing else meanwhile.
        cursor, keys = await _soon(reactor, redis.scan(cursor, f"{PREFIX}:{{*}}:*", 1000))
        for key in map(str, keys):
            for kind in (LEASE, SLOTS):
                if key.endswith(f"}}:{kind}"):
                    names.add(key[len(PREFIX) + 2 : -len(kind) - 2])
        if int(cursor) == 0:
            break
    lines = []
    for name in sorted(names):
        lease, slots = keys_of(name)
        slots = await _soon(reactor, redis.get(slots))
        members = {
            str(member): json.loads(record)
            for member, record in (await _soon(reactor, redis.hgetall(lease))).items()
        }
        about = members.pop("about", {})
        total = sum(member["held"] for member in members.values())
        line = f"{_shown(name)}: {total} of {'its own setting' if slots is None else slots} held"
        if about.get("outlived"):
            line += f", connections that have outlived their lease: {about['outlived']}"
        lines.append(line)
        for member in sorted(members):
            record = members[member]
            wants = ", asks for more" if record["turn"] else ""
            lines.append(f"  {_shown(member)}: {record['held']}, {record['in_use']} in use{wants}")
    return lines


def _shown(name: str) -> str:
    """
    A name as it can be shown on one line of a terminal.
    """
    return name if name.isprintable() else repr(name)


if __name__ == "__main__":
    main()
