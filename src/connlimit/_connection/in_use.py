"""
The limiters of this process that something stands behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from connlimit._limiter.limiter import IN_USE, Limiter
from connlimit._system.descriptors import Budget


def use(limiter: Limiter, factory: Any) -> None:
    """
    A factory stands behind a limiter from now on, and takes descriptors for each connection.
    """
    IN_USE.setdefault(id(limiter), limiter)
    budget = limiter.admission.budget
    if not isinstance(budget, Budget):
        budget = limiter.admission.budget = Budget()
    budget.expect(factory)


def limiters() -> Mapping[str, Limiter]:
    """
    All of them by their names; to names that are there already a number is added.
    """
    named: dict[str, Limiter] = {}
    for limiter in list(IN_USE.values()):
        name, number = limiter.name, 1
        while name in named:
            number += 1
            name = f"{limiter.name} ({number})"
        named[name] = limiter
    return named
