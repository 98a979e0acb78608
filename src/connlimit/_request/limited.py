"""
Requests that wait for a slot before anything of them is processed: of their own class, and of its name.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from zope.interface import directlyProvidedBy, directlyProvides

from connlimit._request.occupant import IFactory, RequestOccupant


class _Limited:
    """
    What the class of a limited request has besides its own.

    Its slots end before its channel reads what was pipelined behind it, and, if it is unfinished, after it
    was told that its connection is over.
    """

    # More than one if it is limited more than once.
    _connlimit_occupants: tuple[RequestOccupant, ...] = ()

    def _cleanup(self) -> None:
        for occupant in self._connlimit_occupants:
            occupant.end()
        self._connlimit_occupants = ()
        super()._cleanup()  # type: ignore[misc]

    def connectionLost(self, reason: Any) -> None:
        try:
            for occupant in self._connlimit_occupants:
                occupant.connection_lost()
            super().connectionLost(reason)  # type: ignore[misc]
        finally:
            self._connlimit_end()

    def _connlimit_end(self) -> None:
        occupants, self._connlimit_occupants = self._connlimit_occupants, ()
        for occupant in occupants:
            occupant.end()


def limited(request_factory: Any, factory: IFactory) -> Any:
    """
    What makes requests as *request_factory* does, a class or any other callable, which wait for a slot.
    """
    if isinstance(request_factory, type):
        return _limited_class(request_factory, factory)
    classes: dict[type, type] = {}

    @wraps(request_factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        request = request_factory(*args, **kwargs)
        cls = type(request)
        if cls not in classes:
            classes[cls] = _limited_class(cls, factory)
        request.__class__ = classes[cls]
        return request

    directlyProvides(make, directlyProvidedBy(request_factory))
    return make


def _limited_class(base: Any, factory: IFactory) -> type:
    bases = (base,) if issubclass(base, _Limited) else (_Limited, base)

    def process(self: Any) -> None:
        occupant = RequestOccupant(self, factory)
        self._connlimit_occupants = (*self._connlimit_occupants, occupant)
        if factory.admission.serve_at_once(occupant):
            base.process(self)
        else:
            occupant.wait_or_be_refused(base.process)

    namespace = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "process": process,
    }
    cls: type = type(base)(base.__name__, bases, namespace)
    directlyProvides(cls, directlyProvidedBy(base))
    return cls
