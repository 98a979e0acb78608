"""
What a reload changes: a plan, made of what runs and of what is to run, without doing anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import TypeVar

import attrs

from connlimit._twistd.config import Config, LimiterConfig, ServiceConfig

#: What only the next start of the program changes.
_AT_NEXT_START = ("log_connections", "processes", "worker_timeout")

#: What makes it another service at the same ports: its connections and its ports are not left alone.
_NEEDS_RESTART = ("limiter", "when_full", "per", "plugin", "tac", "skip")

C = TypeVar("C", LimiterConfig, ServiceConfig)


class Step(Enum):
    """
    What becomes of a limiter or of a service. One that has no step stays as it is.
    """

    #: It is new.
    ADD = "add"
    #: It is there no longer; its connections may finish.
    REMOVE = "remove"
    #: Another replaces it.
    REPLACE = "replace"
    #: A limiter gets other settings, or a service serves in another way, without touching a connection.
    CHANGE = "change"
    #: A service listens at other endpoints, and is otherwise as it was.
    MOVE = "move"


@attrs.frozen
class Plan:
    """
    What a reload changes.

    :ivar config: what is run when it has been carried out.
    :ivar limiters: what becomes of limiters, by their names.
    :ivar services: what becomes of services, by their names.
    :ivar changes_status: whether the status page is another one, or comes, or goes.
    :ivar at_next_start: what differs but can be changed by the next start only.
    """

    config: Config
    limiters: Mapping[str, Step]
    services: Mapping[str, Step]
    changes_status: bool
    at_next_start: tuple[str, ...]


def plan(
    old: Config, new: Config, lost_limiters: Collection[str] = (), lost_services: Collection[str] = ()
) -> Plan:
    """
    Plan what is to be done so that a program that runs *old* runs *new*.

    :param lost_limiters: limiters that cannot go on, whatever is said of them.
    :param lost_services: services whose ports another process has closed. Those that open their ports
        themselves cannot go on.
    """
    limiters = _steps(old.limiters, new.limiters)
    for name, limiter in new.limiters.items():
        if name in old.limiters and (name in lost_limiters or old.limiters[name].shared != limiter.shared):
            limiters[name] = Step.REPLACE
    services = _steps(old.services, new.services)
    for name, service in new.services.items():
        if name not in old.services:
            continue
        before = old.services[name]
        if (
            any(getattr(before, each) != getattr(service, each) for each in _NEEDS_RESTART)
            or limiters.get(service.limiter) in (Step.ADD, Step.REPLACE)
            or (name in lost_services and (service.plugin or service.tac is not None))
        ):
            services[name] = Step.REPLACE
        elif before != service and attrs.evolve(before, listen=service.listen) == service:
            services[name] = Step.MOVE
    differing = [each for each in _AT_NEXT_START if getattr(old, each) != getattr(new, each)]
    kept = {each: getattr(old, each) for each in _AT_NEXT_START}
    return Plan(attrs.evolve(new, **kept), limiters, services, old.status != new.status, tuple(differing))


def _steps(old: Mapping[str, C], new: Mapping[str, C]) -> dict[str, Step]:
    """
    The steps that are seen by comparing alone.
    """
    steps = {name: Step.REMOVE for name in old if name not in new}
    for name, config in new.items():
        if name not in old:
            steps[name] = Step.ADD
        elif config != old[name]:
            steps[name] = Step.CHANGE
    return steps
