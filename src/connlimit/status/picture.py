"""
What there is to see at an instant, in every form in which it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred
from twisted.web.template import Flattenable, flattenString

from connlimit.status import page
from connlimit.status.once import Once
from connlimit.status.watch import Watch

#: Gives others their turn.
Turn = Callable[[], Awaitable[object]]


class Picture:
    """
    The facts of all limiters and of the process. Each form is made once, however many ask for it.

    No turn of the reactor is spent on more than one limiter, or on more than some hundred connections.
    """

    def __init__(
        self,
        limiters: Sequence[tuple[Watch, dict[str, Any]]],
        process: dict[str, Any],
        semaphores: Callable[[bool], Any] | None,
        turn: Turn,
    ) -> None:
        """
        :param limiters: the facts of each limiter, but for those of its peers.
        :param process: the facts of the process.
        :param semaphores: called with whether to show holders, for semaphores' facts; None if there are none.
        """
        self._limiters = limiters
        self._process = process
        self._semaphores = semaphores
        self._turn = turn
        self._peers = Once(self._look_at_peers)
        self._forms: dict[tuple[str, bool], Once[bytes]] = {}
        self._making = {
            "page": self._page,
            "sections": self._sections,
            "event": self._event,
            "json": self._json,
        }

    def form(self, name: str, with_peers: bool) -> Deferred[bytes]:
        """
        The picture as a ``page``, as the ``sections`` of one, as an ``event`` that has these, or as ``json``.

        :param with_peers: whether the addresses of clients may be told.
        """
        key = name, with_peers
        if key not in self._forms:
            self._forms[key] = Once(partial(self._making[name], with_peers))
        return self._forms[key].get()

    @property
    def took(self) -> float:
        """
        How many seconds all that was made of it took.
        """
        return self._peers.took + sum(form.took for form in self._forms.values())

    async def facts(self, with_peers: bool) -> list[dict[str, Any]]:
        """
        The facts of each limiter.
        """
        if not with_peers:
            return [facts for _, facts in self._limiters]
        peers = await self._peers.get()
        return [{**facts, **its} for (_, facts), its in zip(self._limiters, peers, strict=True)]

    async def _look_at_peers(self) -> list[dict[str, Any]]:
        return [await watch.peers(self._turn) for watch, _ in self._limiters]

    async def _json(self, with_peers: bool) -> bytes:
        limiters: list[str] = []
        for facts in await self.facts(with_peers):
            if limiters:
                await self._turn()
            limiters.append(json.dumps(facts))
        others: dict[str, Any] = {}
        if self._semaphores is not None:
            others["semaphores"] = self._semaphores(with_peers)
        others.update(self._process)
        return f'{{"limiters": [{", ".join(limiters)}], {json.dumps(others)[1:]}'.encode()

    async def _page(self, with_peers: bool) -> bytes:
        return page.DOCTYPE + await flattenString(
            None, page.page(self._parts(await self.facts(with_peers), with_peers))
        )

    async def _sections(self, with_peers: bool) -> bytes:
        return await flattenString(None, self._parts(await self.facts(with_peers), with_peers))

    async def _event(self, with_peers: bool) -> bytes:
        sections = await self.form("sections", with_peers)
        return b"data: %s\n\n" % json.dumps(sections.decode()).encode()

    def _parts(self, limiters: list[dict[str, Any]], with_peers: bool) -> Generator[Flattenable, None, None]:
        """
        The sections of the page, each of a limiter in a turn of its own.
        """
        semaphores = [] if self._semaphores is None else self._semaphores(with_peers)
        yield [page.semaphore(facts) for facts in semaphores]
        for number, facts in enumerate(limiters):
            yield self._later(facts) if number else page.limiter(facts)
        yield page.process(self._process)

    async def _later(self, facts: dict[str, Any]) -> Flattenable:
        await self._turn()
        return page.limiter(facts)
