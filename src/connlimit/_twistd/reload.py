"""
A program that runs a `Config`, and is reloaded: with another one it makes a plan, which is carried out.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
from twisted.internet.defer import Deferred, DeferredLock, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python import usage

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import FIELDS
from connlimit._system import systemd
from connlimit._twistd.config import Config, Spelling
from connlimit._twistd.processes.role import Alone
from connlimit._twistd.program import Program
from connlimit._twistd.services.parts import Parts, check
from connlimit._twistd.services.plan import Plan, Step, plan
from connlimit._twistd.services.running import Services
from connlimit._twistd.toml import ConfigError, source
from connlimit.shared.by_url import close, follow

#: Seconds between two attempts to open what could not be opened.
_RETRY_INTERVAL = 1.0


@attrs.frozen
class Source:
    """
    Where a `Config` comes from.

    :ivar spelling: what things are called there.
    :ivar text: the text of the file that was read; None if none was.
    :ivar read: makes a config of such a text; ConfigError if it is wrong.
    """

    spelling: Spelling
    text: str | None
    read: Callable[[str], Config]


class ConfiguredProgram(Program):
    """
    Runs a `Config`. If that is of a file, SIGHUP reads it again.
    """

    _log = Logger(namespace="connlimit.reload")

    def __init__(
        self,
        config: Config,
        parts: dict[str, Parts],
        source: Source,
        reactor: Any,
        role: Alone,
        twistd: usage.Options | None = None,
    ) -> None:
        """
        :param parts: what `check` has found for the config.
        :param twistd: the options of twistd itself.
        :raises ValueError: if a service cannot be made.
        """
        super().__init__(config.drain_timeout, config.log_connections, role)
        self.reactor = reactor
        self.hints = tuple(hint for each in parts.values() for hint in each.hints)
        self._source = source
        # twistd may go to another directory.
        self._path = None if source.spelling.file is None else source.spelling.file.absolute()
        self._text = source.text
        self._config = config
        self._twistd = twistd
        self._departing: list[Limiter] = []
        self._shared: dict[Limiter, str | None] = {}
        self._retrying: IDelayedCall | None = None
        self._changing = DeferredLock()
        self._is_reloading = False
        self._again = False
        for name in config.limiters:
            self.add_limiter(self._limiter(config, name))
        self._services = Services(self, config.status, parts, self.limiters)

    def all_limiters(self) -> list[Limiter]:
        """
        Also those that were removed, while somebody is served by them.
        """
        return [*super().all_limiters(), *self._departing]

    def _limiter(self, config: Config, name: str) -> Limiter:
        told = config.limiters[name]
        limiter = self.role.limiter(told.settings, told.shared)
        self._shared[limiter] = told.shared
        return limiter

    def privilegedStartService(self) -> None:
        """
        Start to listen, or end the program with a sentence that says why not.
        """
        if hasattr(signal, "SIGHUP") and self._path is not None and self.role.reads:
            signal.signal(signal.SIGHUP, lambda number, frame: self.reactor.callFromThread(self.reload))
        super().privilegedStartService()
        self._look_after()

    def _listen(self) -> None:
        super()._listen()
        self._services.open()

    def startService(self) -> None:
        """
        Start what needs no privileges.
        """
        self._or_exit(self._services.start)
        super().startService()

    async def _stop(self) -> None:
        self._is_stopping = True
        async with self._changing:
            pass  # what is being changed has its end, and is stopped then
        self._look_after()
        await super()._stop()

    async def _stop_services(self) -> None:
        await self._services.close()
        await super()._stop_services()

    # Reloading

    def reload(self) -> Deferred[None]:
        """
        Read the file again, and change what has changed in it. A file that is wrong changes nothing.

        :return: fires when that is done; at once if it is being read already, and will be once more.
        """
        if self._is_stopping:
            self._log.info("{path} is not reloaded: the program is stopping", path=str(self._path))
            return succeed(None)
        if self._is_reloading:
            self._again = True
            return succeed(None)
        return ensureDeferred(self._reload())

    async def _reload(self) -> None:
        assert self._path is not None
        self._is_reloading = True
        try:
            systemd.notify_reloading()
            await self.run(source(self._path))
        except ConfigError as error:
            self._refuse(error)
        finally:
            if not self._is_stopping:
                systemd.notify("READY=1")
            self._is_reloading = False
            if self._again and not self._is_stopping:
                self._again = False
                self.reload()

    async def run(self, text: str) -> bool:
        """
        Run what a text says, instead of that which was read before. A text that is wrong changes nothing.

        :return: whether that is done.
        """
        async with self._changing:
            if self._is_stopping:
                return True
            is_done = False
            try:
                await self._change(text)
                is_done = True
                if self._path is not None:
                    self._log.info("reloaded {path}", path=str(self._path))
            except ConfigError as error:
                self._refuse(error)
            except Exception as error:
                self._log.error("{path}: nothing was changed: {error}", path=str(self._path), error=error)
            # Even if nothing was changed, ports may have been closed and opened again.
            self.role.reload(self, self._text)
        self._look_after()
        return is_done

    def _refuse(self, error: ConfigError) -> None:
        for each in error.errors:
            self._log.error("{error}", error=each)
        self._log.error("{path}: nothing was changed", path=str(self._path))

    async def _change(self, text: str) -> None:
        new = self._source.read(text)
        todo = plan(self._config, new, self._lost_limiters(new), self._services.lost())
        unchanged = self._config.services.keys() - todo.services.keys()
        parts = check(new, self._source.spelling, self.reactor, self._twistd, unchanged)
        limiters = self._limiters_of(todo)
        try:
            await self._services.change(todo, parts, limiters, partial(self._settle, text, todo, limiters))
        except BaseException:
            for limiter in limiters.values():
                if limiter not in self.all_limiters():
                    await self._forget(limiter)
            raise

    def _lost_limiters(self, new: Config) -> set[str]:
        """
        The names of the limiters that cannot go on.
        """
        return {
            name
            for name, limiter in self.limiters.items()
            if name in new.limiters and self.role.continued(name, [limiter]) is None
        }

    def _limiters_of(self, todo: Plan) -> dict[str, Limiter]:
        """
        The limiters of a plan: those there are if they can go on, or new ones.

        One that comes back while connections are still served by it is the same: what it serves counts.
        """
        limiters: dict[str, Limiter] = {}
        for name, told in todo.config.limiters.items():
            found: Limiter | None = self.limiters.get(name)
            if todo.limiters.get(name) in (Step.ADD, Step.REPLACE):
                same = [
                    each
                    for each in self.all_limiters()
                    if (each.name, self._shared[each]) == (name, told.shared)
                ]
                found = self.role.continued(name, same)
            limiters[name] = self._limiter(todo.config, name) if found is None else found
        return limiters

    def _settle(self, text: str, todo: Plan, limiters: dict[str, Limiter]) -> None:
        """
        Have all that a plan says but of services, and nothing of which can fail.
        """
        self._text, self._config = text, todo.config
        self.drain_timeout = todo.config.drain_timeout
        self._settle_limiters(todo, limiters)
        for each in todo.at_next_start:
            self._log.info("{key} changes with the next start of the program", key=each)

    def _settle_limiters(self, todo: Plan, limiters: dict[str, Limiter]) -> None:
        known = self.all_limiters()
        self._departing = [each for each in known if each not in limiters.values()]
        for name, limiter in self.limiters.items():
            if limiter in self._departing:
                self._log.info("limiter {name} removed", name=name)
        self.limiters = {}
        for name, limiter in limiters.items():
            if limiter in known:
                settings = todo.config.limiters[name].settings
                limiter.reconfigure(**{each: getattr(settings, each) for each in FIELDS})
                if self._shared[limiter] is not None:
                    follow(limiter.limits, limiter.settings)
                self.limiters[name] = limiter
            else:
                self.add_limiter(limiter)
                self._log.info("limiter {name} added", name=name)

    async def _forget(self, limiter: Limiter) -> None:
        del self._shared[limiter]
        self.role.forget(limiter)
        await close(limiter.limits)

    # What goes on without being asked for

    def _look_after(self) -> None:
        """
        Try to open what is not open, and forget limiters whose last connection has ended.
        """
        if self._retrying is not None:
            if self._retrying.active():
                self._retrying.cancel()
            self._retrying = None
        if self._is_stopping:
            return
        if not self._changing.locked:
            if self._services.retry():
                self.role.reload(self, self._text)
            for limiter in self._departing[:]:
                if self.role.is_over(limiter):
                    self._departing.remove(limiter)
                    ensureDeferred(self._forget(limiter))
        if self._changing.locked or self._departing or not self._services.are_open():
            self._retrying = self.reactor.callLater(_RETRY_INTERVAL, self._look_after)
