"""
The plan of a reload: of any two configs, what becomes of which limiter and service, without doing any of it.
"""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connlimit._limiter.settings import Settings
from connlimit._twistd.config import Config, LimiterConfig, ServiceConfig, StatusConfig
from connlimit._twistd.services.plan import Plan, Step, plan
from connlimit._twistd.targets.relay_options import RelayOptions

#: Configs are large, and the machine may be busy.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LISTEN = st.sampled_from([(), ("tcp:1",), ("tcp:2",), ("tcp:1", "tcp:2")])
LIMITERS = st.builds(
    LimiterConfig,
    st.builds(
        Settings, max_connections=st.sampled_from([None, 1, 2]), order=st.sampled_from(["fifo", "lifo"])
    ),
    st.sampled_from([None, "redis://one", "redis://two"]),
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """
    Any config.
    """
    limiters = draw(st.dictionaries(st.sampled_from("abc"), LIMITERS, min_size=1))
    service = st.builds(
        ServiceConfig,
        st.just(""),
        st.sampled_from(sorted(limiters)),
        LISTEN,
        st.sampled_from([None, "tcp:h:1", "tcp:h:2"]),
        st.sampled_from([None, "m:f"]),
        st.sampled_from([(), ("web",), ("web", "--path=.")]),
        st.sampled_from(["refuse", "stop-accepting"]),
        st.sampled_from([RelayOptions(), RelayOptions(connect_timeout=9)]),
        st.sampled_from([None, "a.tac"]),
        st.sampled_from([(), ("tcp:9",)]),
        st.sampled_from(["connection", "request"]),
    )
    services = draw(st.dictionaries(st.sampled_from("xyz"), service))
    return Config(
        limiters,
        {name: attrs.evolve(each, name=name) for name, each in services.items()},
        draw(st.sampled_from([None, StatusConfig("tcp:7"), StatusConfig("tcp:8")])),
        draw(st.sampled_from([0.0, 5.0])),
        draw(st.booleans()),
        draw(st.sampled_from([1, 2])),
    )


def carried_out(old: Config, new: Config) -> Config:
    """
    What runs when the plan from one to the other is carried out, with no more done than its steps say.
    """
    todo = plan(old, new)
    limiters, services = dict(old.limiters), dict(old.services)
    for name, step in todo.limiters.items():
        if step is Step.REMOVE:
            del limiters[name]
        elif step is Step.CHANGE:
            limiters[name] = attrs.evolve(limiters[name], settings=new.limiters[name].settings)
        else:
            assert (step is Step.ADD) == (name not in old.limiters)
            limiters[name] = new.limiters[name]
    for name, step in todo.services.items():
        if step is Step.REMOVE:
            del services[name]
        elif step is Step.MOVE:
            services[name] = attrs.evolve(services[name], listen=new.services[name].listen)
        elif step is Step.CHANGE:
            its = new.services[name]
            services[name] = attrs.evolve(
                services[name], listen=its.listen, forward=its.forward, relay=its.relay, factory=its.factory
            )
        else:
            assert (step is Step.ADD) == (name not in old.services)
            services[name] = new.services[name]
    status = new.status if todo.changes_status else old.status
    kept = {name: getattr(old, name) for name in todo.at_next_start}
    changed = attrs.evolve(new, limiters=limiters, services=services, status=status, **kept)
    assert changed == todo.config
    return changed


@UNHURRIED
@given(configs(), configs())
def test_whatever_ran_and_is_to_run_the_steps_of_a_plan_lead_from_one_to_the_other(
    old: Config, new: Config
) -> None:
    last = {name: getattr(old, name) for name in ("log_connections", "processes", "worker_timeout")}
    assert carried_out(old, new) == attrs.evolve(new, **last)


@UNHURRIED
@given(configs())
def test_a_plan_for_what_runs_already_is_empty(config: Config) -> None:
    assert plan(config, config) == Plan(config, {}, {}, False, ())


@UNHURRIED
@given(configs(), configs())
def test_what_is_left_of_a_plan_that_was_carried_out_is_for_the_next_start(old: Config, new: Config) -> None:
    first = plan(old, new)
    second = plan(first.config, new)
    assert second == Plan(first.config, {}, {}, False, first.at_next_start)


@UNHURRIED
@given(configs(), configs())
def test_no_service_goes_on_behind_a_limiter_that_is_another_one(old: Config, new: Config) -> None:
    todo = plan(old, new)
    for name, service in new.services.items():
        if todo.services.get(name) not in (Step.ADD, Step.REPLACE):
            assert service.limiter == old.services[name].limiter
            assert todo.limiters.get(service.limiter) in (None, Step.CHANGE)


WEB = LimiterConfig(Settings(max_connections=5, name="web"))
SITE = ServiceConfig("site", "web", ("tcp:1",), "tcp:h:1")
ONE = Config({"web": WEB}, {"site": SITE})


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"listen": ("tcp:2",)}, Step.MOVE),
        ({"forward": "tcp:h:2"}, Step.CHANGE),
        ({"forward": None, "factory": "m:f"}, Step.CHANGE),
        ({"relay": RelayOptions(connect_timeout=1), "listen": ("tcp:2",)}, Step.CHANGE),
        ({"when_full": "stop-accepting"}, Step.REPLACE),
        ({"forward": None, "listen": (), "plugin": ("web",)}, Step.REPLACE),
    ],
)
def test_a_service_that_changes_is_touched_as_little_as_can_be(changes: dict[str, Any], step: Step) -> None:
    new = attrs.evolve(ONE, services={"site": attrs.evolve(SITE, **changes)})
    todo = plan(ONE, new)
    assert (todo.limiters, todo.services) == ({}, {"site": step})


def test_a_limiter_that_is_shared_elsewhere_takes_its_services_with_it() -> None:
    new = attrs.evolve(ONE, limiters={"web": attrs.evolve(WEB, shared="redis://other")})
    todo = plan(ONE, new)
    assert (todo.limiters, todo.services) == ({"web": Step.REPLACE}, {"site": Step.REPLACE})
    more = LimiterConfig(Settings(max_connections=9, name="web"))
    todo = plan(ONE, attrs.evolve(ONE, limiters={"web": more}))
    assert (todo.limiters, todo.services) == ({"web": Step.CHANGE}, {})


def test_what_cannot_go_on_is_replaced_though_nothing_is_said_of_it() -> None:
    todo = plan(ONE, ONE, lost_limiters={"web"})
    assert (todo.limiters, todo.services) == ({"web": Step.REPLACE}, {"site": Step.REPLACE})
    assert plan(ONE, ONE, lost_services={"site"}).services == {}  # its ports alone are opened once more
    plugin = attrs.evolve(ONE, services={"site": ServiceConfig("site", "web", plugin=("web",))})
    assert plan(plugin, plugin, lost_services={"site"}).services == {"site": Step.REPLACE}


def test_what_only_the_next_start_changes_is_named_until_then() -> None:
    todo = plan(ONE, attrs.evolve(ONE, processes=4, worker_timeout=5.0, drain_timeout=9.0))
    assert todo.at_next_start == ("processes", "worker_timeout")
    assert (todo.config.processes, todo.config.drain_timeout) == (1, 9.0)
