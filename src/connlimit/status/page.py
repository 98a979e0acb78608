"""
The status page, as it is without a script; with one, its sections are replaced each second.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from twisted.web.iweb import IRequest
from twisted.web.template import Element, Flattenable, Tag, XMLString, renderer, tags

from connlimit.interfaces import COUNTER, FIGURES, FLAG, GAUGE, MAXIMUM
from connlimit.status.watch import SAMPLES

_WIDTH, _HEIGHT, _POINTS = 600, 120, 200

_FILES = files(__package__) / "static"

CSS = (_FILES / "status.css").read_text()
SCRIPT = (_FILES / "status.js").read_text()

DOCTYPE = b"<!DOCTYPE html>\n"

_PAGE, _SECTION, _BAR, _CHART, _TABLE = (
    XMLString((_FILES / f"{name}.xml").read_text()) for name in ("page", "section", "bar", "chart", "table")
)


class Part(Element):
    """
    A part of the page: a template whose slots are filled.
    """

    def __init__(self, template: XMLString, **slots: Flattenable) -> None:
        super().__init__(template)
        self._slots = slots

    @renderer
    def filled(self, request: IRequest | None, tag: Tag) -> Tag:
        """
        What the template makes of them.
        """
        return tag.fillSlots(**self._slots)


def page(sections: Flattenable) -> Part:
    """
    The whole page, which begins with `DOCTYPE`.

    :param sections: one for each semaphore and each limiter, and one for the process.
    """
    return Part(_PAGE, sections=sections)


def semaphore(facts: dict[str, Any]) -> Part:
    """
    The section of a semaphore.
    """
    maximum = facts["full_count"]
    counts = [
        ("level", facts["level"]),
        ("pending", facts["pending"]),
        ("longest pending", _seconds(facts["longest_pending"])),
    ]
    tables = [_table("Counts", counts)]
    if "holders" in facts:
        rows = [(each["peer"], each["count"], _seconds(each["for"])) for each in facts["holders"]]
        tables.append(_table("Held longest", rows, ("peer", "count", "for")))
    pictures = [_bar("active", "acquired", facts["acquired"], maximum)]
    return _section("semaphore", facts["name"], facts["acquired"] >= maximum, [], pictures, tables)


def limiter(facts: dict[str, Any]) -> Part:
    """
    The section of a limiter.
    """
    maximum = facts["max_connections"]
    now = [each for each, figure in FIGURES.items() if figure.kind in (GAUGE, MAXIMUM) and not figure.setting]
    counters = [each for each, figure in FIGURES.items() if figure.kind == COUNTER]
    percentiles = [
        (f"{p[1:]} % waited at most", _seconds(value)) for p, value in facts["percentiles"].items()
    ]
    tables = [
        _table("Counters", [row for each in counters for row in _rows(each, facts)]),
        _table("Now", [row for each in now for row in _rows(each, facts)]),
        _table("Waiting", percentiles),
    ]
    if "peers" in facts:
        peers = [(p["peer"], p["active"], p["waiting"]) for p in facts["peers"]]
        queue = [(w["address"], _seconds(w["age"])) for w in facts["queue"]]
        tables.append(_table("Busiest peers", peers, ("peer", "served", "waiting")))
        tables.append(_table("First in the queue", queue, ("address", "waits for")))
    bars = [
        _bar(name, figure.title, facts[name], facts[figure.setting])
        for name, figure in FIGURES.items()
        if figure.setting
    ]
    flags = [figure.title for name, figure in FIGURES.items() if figure.kind == FLAG and facts[name]]
    is_full = maximum is not None and facts["active"] >= maximum
    return _section("limiter", facts["name"], is_full, flags, [*bars, _chart(facts["history"])], tables)


def process(facts: dict[str, Any]) -> Flattenable:
    """
    The section of the process.
    """
    descriptors = facts["descriptors"]
    rows = [
        ("connlimit", facts["version"]),
        ("descriptors", f"{descriptors['open']} of {descriptors['limit']}"),
        ("PROXY headers being read", facts["headers"]),
        ("refusals being said", facts["refusals"]),
        ("reactor lag", _seconds(facts["reactor_lag"])),
    ]
    return tags.section(_table("Process", rows), **{"aria-label": "process"})


def _section(
    kind: str, name: str, is_full: bool, flags: list[str], pictures: list[Part], tables: list[Part]
) -> Part:
    state: list[Flattenable] = [f" · {flag}" for flag in flags]
    if is_full:
        state += [" ", tags.span("full", class_="state")]
    return Part(
        _SECTION,
        **{"class": "full" if is_full else "room"},
        id=f"{kind}-{name}",
        name=name,
        state=state,
        pictures=pictures,
        tables=tables,
    )


def _rows(name: str, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """
    What is shown of a figure: a number, or those that are not 0 of what it is counted by.
    """
    figure, value = FIGURES[name], facts[name]
    if figure.label:
        return [(f"{figure.title}: {each}", str(count)) for each, count in value.items() if count]
    if value is None:
        return [(figure.title, "unknown")]
    return [(figure.title, _seconds(value) if figure.unit == "seconds" else str(value))]


def _bar(cls: str, word: str, value: int, maximum: int | None) -> Part:
    share = min(1.0, value / maximum) if maximum else float(maximum == 0 and value > 0)
    return Part(
        _BAR,
        **{"class": cls},
        word=word,
        value=str(value),
        of="no limit" if maximum is None else f"of {maximum}",
        width=f"{share * 100:.1f}",
    )


def _chart(history: dict[str, list[int]]) -> Part:
    top = max([1, *(value for values in history.values() for value in values)])
    return Part(
        _CHART,
        box=f"0 0 {_WIDTH} {_HEIGHT}",
        highest=str(top),
        now=", ".join(f"{values[-1] if values else 0} {name}" for name, values in history.items()),
        **{name: _points(values, top) for name, values in history.items()},
    )


def _points(values: list[int], top: int) -> str:
    """
    The points of a line through the highest values of each piece of time.
    """
    step = max(1, SAMPLES // _POINTS)
    # Counted from the end, so that a piece keeps its values while time goes on.
    pieces = [max(values[max(0, end - step) : end]) for end in range(len(values), 0, -step)]
    return " ".join(
        f"{_WIDTH - index * _WIDTH / _POINTS:.0f},{_HEIGHT - 2 - value / top * (_HEIGHT - 4):.0f}"
        for index, value in enumerate(pieces)
    )


def _table(title: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = ()) -> Part:
    head = tags.thead(tags.tr([tags.th(column, scope="col") for column in columns])) if columns else ""
    body = [
        tags.tr(tags.th(str(first), scope="row"), [tags.td(str(value)) for value in others])
        for first, *others in rows
    ]
    return Part(_TABLE, title=title, head=head, rows=body)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
