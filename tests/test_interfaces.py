"""
The table of figures, and whatever is made from it.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.web.template import flattenString

from connlimit import Limiter, Snapshot
from connlimit._twistd.processes.reports import PooledLimiter, Reporter
from connlimit.interfaces import COUNTER, FIGURES, FLAG, GAUGE, MAXIMUM, figure, figures_of
from connlimit.status import page, top
from connlimit.status.watch import Watch

#: What is told of a figure of each kind.
KINDS = {COUNTER: 7, GAUGE: 7, MAXIMUM: 7, FLAG: True}


@attrs.frozen
class Larger(Snapshot):
    """
    A snapshot of one more field.
    """

    tidied_up: Any = attrs.field(metadata=figure(COUNTER, "so tidy"))


class Tidy(Limiter):
    """
    A limiter that has one more thing to tell.
    """

    told: Any = 0

    def snapshot(self) -> Larger:
        return Larger(**attrs.asdict(super().snapshot(), recurse=False), tidied_up=self.told)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    The kind of a figure that has just been added to the table.
    """
    added = figures_of(Larger)["tidied_up"]
    monkeypatch.setitem(FIGURES, "tidied_up", attrs.evolve(added, kind=request.param))
    monkeypatch.setattr(Tidy, "told", KINDS[request.param])
    return request.param


def facts(kind: str) -> dict[str, Any]:
    """
    What the JSON has of a limiter that tells one more figure of that kind.
    """
    return json.loads(json.dumps({**Watch(Tidy(1)).facts(), "history": Watch(Tidy(1)).history()}))


def test_every_field_is_a_figure_but_for_the_dry_run() -> None:
    assert [*FIGURES, "dry_run"] == list(attrs.fields_dict(Snapshot))
    for each in FIGURES.values():
        assert each.kind in KINDS
        assert each.help
        assert each.title
        assert each.unit in ("connections", "seconds") or each.kind == FLAG


def test_another_figure_is_in_the_json(kind: str) -> None:
    assert facts(kind)["tidied_up"] == KINDS[kind]


def test_another_figure_is_on_the_page(kind: str) -> None:
    shown: list[bytes] = []
    flattenString(None, page.limiter(facts(kind))).addCallback(shown.append)
    expected = "· tidied up" if kind == FLAG else '<th scope="row">tidied up</th><td>7</td>'
    assert expected in shown[0].decode()


def test_another_figure_is_shown_in_a_terminal(kind: str) -> None:
    state = {"limiters": [facts(kind)], "descriptors": {"open": 1, "limit": 2}, "reactor_lag": 0.0}
    assert ("(tidied up)" if kind == FLAG else "tidied up: 7") in "\n".join(top.lines(state))


def test_another_figure_is_a_metric(kind: str) -> None:
    metrics = pytest.importorskip("connlimit.status.metrics")
    exposition = metrics.exposition([Watch(Tidy(1, name="main"))]).decode()
    total = "_total" if kind == COUNTER else ""
    assert f'connlimit_tidied_up{total}{{limiter="main"}} {float(KINDS[kind])}\n' in exposition
    assert f"# HELP connlimit_tidied_up{total} So tidy.\n" in exposition


def test_another_figure_is_reported_by_workers_and_added_up(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [report for _ in range(2) for report in Reporter(Tidy(1)).reports()]
    assert [json.loads(report)["figures"]["tidied_up"] for report in reports] == [KINDS[kind]] * 2
    # The process that adds up has nothing of its own.
    monkeypatch.setattr(Tidy, "told", type(KINDS[kind])())
    pooled = PooledLimiter(Tidy(1))
    for worker, report in enumerate(reports):
        pooled.take(worker, report)
    assert pooled.snapshot().tidied_up == {COUNTER: 14, GAUGE: 14, MAXIMUM: 7, FLAG: False}[kind]
    pooled.forget(0)
    assert pooled.snapshot().tidied_up == {COUNTER: 14, GAUGE: 7, MAXIMUM: 7, FLAG: False}[kind]


def test_another_figure_is_in_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs" / "_extensions")
    assert "* - ``tidied_up``" in import_module("generated").figures()
