"""
The status page, as it is without a script; with one, its sections are replaced each second.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Any

from connlimit.interfaces import COUNTER, FIGURES, FLAG, GAUGE, MAXIMUM
from connlimit.status.watch import SAMPLES

_WIDTH, _HEIGHT, _POINTS = 600, 120, 200

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>connlimit status</title>
<link rel="stylesheet" href="status.css">
<link rel="icon" href="data:,">
<script src="status.js" defer></script>
</head>
<body>
<header><h1>connlimit</h1><p id="connection" role="status">as of when this page was loaded</p></header>
<main id="main">
{sections}
</main>
<footer><p><a href="status.json">the same as JSON</a> · <a href="metrics">metrics</a> ·
<a href="health">health</a></p></footer>
</body>
</html>
"""

CSS = files(__package__).joinpath("status.css").read_text()
SCRIPT = files(__package__).joinpath("status.js").read_text()


def page(sections: str) -> str:
    """
    The whole page.

    :param sections: one for each semaphore and each limiter, and one for the process.
    """
    return PAGE.format(sections=sections)


def semaphore(facts: dict[str, Any]) -> str:
    """
    The section of a semaphore.
    """
    name, most = escape(facts["name"]), facts["full_count"]
    full = facts["acquired"] >= most
    counts = [
        ("level", facts["level"]),
        ("pending", facts["pending"]),
        ("longest pending", _seconds(facts["longest_pending"])),
    ]
    tables = _table("Counts", counts)
    if "holders" in facts:
        rows = [(each["peer"], each["count"], _seconds(each["for"])) for each in facts["holders"]]
        tables += _table("Held longest", rows, ("peer", "count", "for"))
    state = ' <span class="state">full</span>' if full else ""
    return (
        f'<section class="{"full" if full else "room"}" aria-labelledby="semaphore-{name}">'
        f'<h2 id="semaphore-{name}">{name}{state}</h2>'
        + _bar("active", "acquired", facts["acquired"], most)
        + f'<div class="tables">{tables}</div></section>'
    )


def limiter(facts: dict[str, Any]) -> str:
    """
    The section of a limiter.
    """
    name = escape(facts["name"])
    most = facts["max_connections"]
    full = most is not None and facts["active"] >= most
    percentiles = [
        (f"{p[1:]} % waited at most", _seconds(value)) for p, value in facts["percentiles"].items()
    ]
    tables = _table(
        "Counters", [row for each in FIGURES if FIGURES[each].kind == COUNTER for row in _rows(each, facts)]
    )
    now = [each for each, figure in FIGURES.items() if figure.kind in (GAUGE, MAXIMUM) and not figure.setting]
    tables += _table("Now", [row for each in now for row in _rows(each, facts)])
    tables += _table("Waiting", percentiles)
    if "peers" in facts:
        peers = [(p["peer"], p["active"], p["waiting"]) for p in facts["peers"]]
        tables += _table("Busiest peers", peers, ("peer", "served", "waiting"))
        line = [(w["address"], _seconds(w["age"])) for w in facts["line"]]
        tables += _table("First in line", line, ("address", "waits for"))
    flags = [escape(each.title) for name, each in FIGURES.items() if each.kind == FLAG and facts[name]]
    state = "".join(f" · {flag}" for flag in flags)
    if full:
        state += ' <span class="state">full</span>'
    return (
        f'<section class="{"full" if full else "room"}" aria-labelledby="limiter-{name}">'
        f'<h2 id="limiter-{name}">{name}{state}</h2>'
        + "".join(
            _bar(name, figure.title, facts[name], facts[figure.setting])
            for name, figure in FIGURES.items()
            if figure.setting
        )
        + _chart(facts["history"])
        + f'<div class="tables">{tables}</div></section>'
    )


def _rows(name: str, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """
    What there is to tell of a figure: a number, or those that are not 0 of what it is counted by.
    """
    figure, value = FIGURES[name], facts[name]
    if figure.label:
        return [(f"{figure.title}: {each}", str(count)) for each, count in value.items() if count]
    if value is None:
        return [(figure.title, "unknown")]
    return [(figure.title, _seconds(value) if figure.unit == "seconds" else str(value))]


def _bar(cls: str, word: str, value: int, most: int | None) -> str:
    of = "no limit" if most is None else f"of {most}"
    share = min(1.0, value / most) if most else float(most == 0 and value > 0)
    return (
        f'<p><strong>{value}</strong> {word} <span class="unit">{of}</span></p>'
        f'<svg class="bar" viewBox="0 0 100 2" preserveAspectRatio="none" role="img" '
        f'aria-label="{value} {word}, {of}"><rect class="all" width="100" height="2"/>'
        f'<rect class="{cls}" width="{share * 100:.1f}" height="2"/></svg>'
    )


def _chart(history: dict[str, list[int]]) -> str:
    top = max([1, *(value for values in history.values() for value in values)])
    lines = "".join(
        f'<polyline class="{name}" points="{_points(values, top)}"/>' for name, values in history.items()
    )
    key = "".join(
        f'<span><svg viewBox="0 0 3 1" aria-hidden="true"><rect class="{name}" width="3" height="1"/></svg> '
        f"{word}</span>"
        for name, word in (("active", "served"), ("waiting", "waiting"), ("refused", "refused a second"))
    )
    latest = ", ".join(f"{values[-1] if values else 0} {name}" for name, values in history.items())
    return (
        f"<h3>The last ten minutes</h3>"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="The last ten minutes, at most {top}; now {latest}">{lines}</svg>'
        f'<p class="key">{key}<span class="unit">highest: {top}</span></p>'
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


def process(facts: dict[str, Any]) -> str:
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
    return f'<section aria-label="process">{_table("Process", rows)}</section>'


def _table(title: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = ()) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(value))}</td>" for value in others)
        + "</tr>"
        for first, *others in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"<div><h3>{title}</h3><table>{head}<tbody>{body}</tbody></table></div>"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
