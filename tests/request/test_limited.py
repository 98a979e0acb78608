"""
The class of limited requests.
"""

from __future__ import annotations

from typing import Any

from support.web import RequestTestCase
from twisted.web import http, server
from twisted.web.iweb import INonQueuedRequestFactory, IRequest
from zope.interface import alsoProvides


class Own(server.Request):
    """
    A request of an application's own.
    """


class ClassTests(RequestTestCase):
    """
    A limited request is what it was.
    """

    def request_of(self, request_factory: object) -> Any:
        self.limited(1)
        self.site.requestFactory = request_factory
        self.ask(*self.connect())
        self.assert_counts(active=1)
        return self.page.requests[0]

    def test_it_is_of_the_sites_class_and_called_so(self) -> None:
        for cls in (server.Request, Own):
            request = self.request_of(cls)
            self.assertIsInstance(request, cls)
            self.assertEqual(type(request).__name__, cls.__name__)
            self.assertEqual(type(request).__qualname__, cls.__qualname__)
            self.assertEqual(type(request).__module__, cls.__module__)
            self.assertEqual(type(request).__doc__, cls.__doc__)
            self.assertTrue(IRequest.providedBy(request))
            self.assertTrue(repr(request).startswith(f"<{cls.__name__} at"))

    def test_a_function_can_make_it(self) -> None:
        def make(*args: Any, **kwargs: Any) -> Own:
            return Own(*args, **kwargs)

        make.made_by = "us"
        self.assertIsInstance(self.request_of(make), Own)
        self.assertEqual(self.factory.buildProtocol(None).requestFactory.made_by, "us")

    def test_what_makes_it_is_called_as_ever(self) -> None:
        class NonQueued(server.Request):
            def __init__(self, channel: http.HTTPChannel) -> None:
                super().__init__(channel)

        def make(channel: http.HTTPChannel) -> NonQueued:
            return NonQueued(channel)

        for request_factory in (NonQueued, make):
            alsoProvides(request_factory, INonQueuedRequestFactory)
            self.assertIsInstance(self.request_of(request_factory), NonQueued)

    def test_one_class_is_made_for_all_connections(self) -> None:
        self.limited(2)
        self.ask(*self.connect(2))
        first, second = self.page.requests
        self.assertIs(type(first), type(second))

    def test_the_sites_class_can_be_changed_while_it_runs(self) -> None:
        self.limited(3)
        for cls in (server.Request, Own):
            self.site.requestFactory = cls
            self.ask(*self.connect())
        self.assertEqual([isinstance(each, Own) for each in self.page.requests], [False, True])
