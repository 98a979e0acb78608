"""
All services of a running program, and its status page: opened, exchanged and closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from twisted.internet.error import CannotListenError
from twisted.logger import Logger

from connlimit._limiter.limiter import Limiter
from connlimit._twistd.config import StatusConfig
from connlimit._twistd.processes.inherited_ports import NotOpened
from connlimit._twistd.services.parts import Parts
from connlimit._twistd.services.plan import Plan, Step
from connlimit._twistd.services.units import IShown, Page, PluginUnit, ServiceUnit, Unit

Pieces = list[tuple[Unit, str]]


class Services:
    """
    The services and the status page of a program.

    What cannot be opened where a plan wants it changes nothing. What else cannot be opened, a status page or
    what was open before, is tried again.
    """

    _log = Logger(namespace="connlimit.reload")

    def __init__(
        self,
        program: IShown,
        status: StatusConfig | None,
        parts: Mapping[str, Parts],
        limiters: Mapping[str, Limiter],
    ) -> None:
        """
        :param parts: what the services are made of.
        :raises ValueError: if one cannot be made.
        """
        self._program = program
        self._units = {name: self._unit(each, limiters, has_privileges=True) for name, each in parts.items()}
        self._page = Page(program, status)
        self._page.make()
        self._failed: dict[tuple[str, str], str] = {}

    def open(self) -> None:
        """
        Open all services, or raise the reason why one cannot be opened. Then `start` them.
        """
        for unit in self._units.values():
            for piece in unit.wanted():
                self._open(unit, piece, [])

    def start(self) -> None:
        """
        Start what need not be started with privileges.
        """
        for unit in self._units.values():
            unit.start()

    async def close(self) -> None:
        """
        Close all services, and wait for each as long as it takes.
        """
        for unit in list(self._units.values()):
            for piece in unit.opened():
                await unit.close(piece, None)

    def lost(self) -> set[str]:
        """
        The names of the services some of whose ports another process has closed.
        """
        return {name for name, unit in self._units.items() if unit.stale()}

    async def change(
        self,
        plan: Plan,
        parts: Mapping[str, Parts],
        limiters: Mapping[str, Limiter],
        settle: Callable[[], None],
    ) -> None:
        """
        Carry out a plan, or raise the reason why that is impossible, and leave everything as it was.

        :param settle: called when it can no longer be impossible, and before anything is closed.
        """
        units = {
            name: self._unit(each, limiters)
            if plan.services.get(name) in (Step.ADD, Step.REPLACE)
            else self._units[name]
            for name, each in parts.items()
        }
        page = Page(self._program, plan.config.status) if plan.changes_status else self._page
        before = {unit: unit.endpoints for unit in units.values()}
        for name, unit in units.items():
            for piece in unit.stale():
                await unit.close(piece)
            unit.endpoints = parts[name].endpoints
        old_units: list[Unit] = [*self._units.values(), self._page]
        new_units: list[Unit] = [*units.values(), page]
        closing = [
            (unit, piece)
            for unit in old_units
            for piece in unit.opened()
            if unit not in new_units or piece not in unit.wanted()
        ]
        opened: Pieces = []
        closed: Pieces = []
        try:
            await self._open_all(_missing(units.values()), closing, opened, closed)
        except BaseException:
            for each, piece in opened:
                await each.close(piece)
            for unit, endpoints in before.items():
                unit.endpoints = endpoints
            for each, piece in closed:
                self._try(each, piece)
            raise
        # From here on nothing fails.
        self._tell(plan, units, parts)
        self._units, self._page = units, page
        settle()
        for each, piece in closing:
            if (each, piece) not in closed:
                await each.close(piece)
        for each, piece in _missing([page]):
            self._try(each, piece)

    def retry(self) -> bool:
        """
        Try to open what is not open.

        :return: whether something was opened.
        """
        missing = self._missing()
        wanted = {(unit.name, piece) for unit, piece in missing}
        self._failed = {key: error for key, error in self._failed.items() if key in wanted}
        tried = [self._try(unit, piece) for unit, piece in missing]
        return any(tried)

    def are_open(self) -> bool:
        """
        Whether everything that should be open is.
        """
        return not self._missing()

    def _missing(self) -> Pieces:
        return _missing([*self._units.values(), self._page])

    def _unit(
        self, parts: Parts, limiters: Mapping[str, Limiter], has_privileges: bool = False
    ) -> ServiceUnit:
        make = ServiceUnit if parts.make_plugin is None else PluginUnit
        return make(parts, limiters[parts.config.limiter], self._program.role, has_privileges)

    async def _open_all(self, opening: Pieces, closing: Pieces, opened: Pieces, closed: Pieces) -> None:
        """
        Open some pieces; of those to be closed, close only what stands in their way.

        :param opened: has what was opened, whatever happens.
        :param closed: has what was closed.
        """
        later = []
        for unit, piece in opening:
            # Two of a plugin may not get on with each other, whatever they listen at.
            blocking = [
                each for each in closing if isinstance(unit, PluginUnit) and each[0].name == unit.name
            ]
            if not blocking:
                try:
                    self._open(unit, piece, opened)
                    continue
                except CannotListenError as error:
                    blocking = [each for each in closing if each[0].may_be_at(each[1], error.port)]
                    if not blocking:
                        raise
            later.append((unit, piece, blocking))
        for unit, piece, blocking in later:
            for each in blocking:
                if each not in closed:
                    closed.append(each)
                    await each[0].close(each[1])
            self._open(unit, piece, opened)

    def _open(self, unit: Unit, piece: str, opened: Pieces) -> None:
        try:
            unit.open(piece)
        except NotOpened:
            return  # it is tried again
        opened.append((unit, piece))

    def _try(self, unit: Unit, piece: str) -> bool:
        """
        Open a piece, or log once why that is impossible.
        """
        key = unit.name, piece
        try:
            unit.open(piece)
        except NotOpened:
            return False
        except Exception as error:
            if self._failed.get(key) != str(error):
                self._failed[key] = str(error)
                self._log.error(
                    "{name} cannot be started: {error}; it is tried again every second",
                    name=unit.name,
                    error=error,
                )
            return False
        if self._failed.pop(key, None) is not None:
            self._log.info("{name} started", name=unit.name)
        return True

    def _tell(self, plan: Plan, units: Mapping[str, ServiceUnit], parts: Mapping[str, Parts]) -> None:
        """
        Let those services that go on serve in another way, and log what becomes of all.
        """
        for name, step in plan.services.items():
            if step is Step.REMOVE:
                self._log.info("service {name} removed; its connections may finish", name=name)
            elif step is Step.ADD:
                self._log.info("service {name} added", name=name)
            elif step is Step.REPLACE:
                self._log.info("service {name} restarted", name=name)
            else:
                units[name].change(parts[name])
                self._log.info("service {name} changed", name=name)


def _missing(units: Iterable[Any]) -> Pieces:
    return [(unit, piece) for unit in units for piece in unit.wanted() if piece not in unit.opened()]
