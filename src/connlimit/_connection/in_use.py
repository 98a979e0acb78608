"""
The limiters of this process that something stands behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from connlimit._system.descriptors import Budget

if TYPE_CHECKING:
    from connlimit._limiter.limiter import Limiter

# In the order in which they came into use, as long as somebody else holds them.
_limiters: WeakValueDictionary[int, Limiter] = WeakValueDictionary()


def use(limiter: Limiter, factory: Any) -> None:
    """
    A factory stands behind a limiter from now on, and takes descriptors for each connection.
    """
    _limiters.setdefault(id(limiter), limiter)
    budget = limiter.admission.budget
    if not isinstance(budget, Budget):
        budget = limiter.admission.budget = Budget()
    budget.expect(factory)


def limiters() -> Mapping[str, Limiter]:
    """
    All of them by their names; to names that are there already a number is added.
    """
    named: dict[str, Limiter] = {}
    for limiter in list(_limiters.values()):
        name, number = limiter.name, 1
        while name in named:
            number += 1
            name = f"{limiter.name} ({number})"
        named[name] = limiter
    return named
