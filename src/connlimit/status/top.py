"""
The status of limiters in a terminal: ``connlimit-top URL``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from connlimit._limiter.values import SECONDS
from connlimit._system.version import __version__
from connlimit.interfaces import COUNTER, FIGURES, FLAG, GAUGE, MAXIMUM, Figure

_BAR = 30
_WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Show the status again and again, or once.

    :return: the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="connlimit-top",
        description="Shows the status of limiters in a terminal, again and again.",
        epilog="Example: connlimit-top --interval 500ms http://127.0.0.1:8081/",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("url", help="the URL of a status page, such as http://127.0.0.1:8081/")
    parser.add_argument("--once", action="store_true", help="show the status once, and exit")
    parser.add_argument("--json", action="store_true", help="show it as JSON, one line each time")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="TIME",
        help="show it as often, such as 500ms or 5s [default: 1s]",
    )
    options = parser.parse_args(arguments)
    # An exception would be lost, were something being collected as garbage at that instant.
    previous = signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))
    try:
        return _show(options)
    except BrokenPipeError:
        # Nobody reads any more; what is left must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        signal.signal(signal.SIGINT, previous)


def _show(options: argparse.Namespace) -> int:
    clear = "" if options.once or options.json or not sys.stdout.isatty() else "\x1b[H\x1b[J"
    has_answered, is_waiting = False, False
    while True:
        try:
            state = fetch(options.url)
        except (OSError, ValueError, HTTPException) as error:
            is_wrong = isinstance(error, (HTTPError, ValueError)) and not has_answered
            if options.once or is_wrong:
                _say(f"URL must be that of a status page, not {options.url!r}: {error}")
                return 1
            if not is_waiting:
                is_waiting = True
                _say(f"no answer from {options.url}: {error}; trying again")
        else:
            if is_waiting:
                is_waiting = False
                _say(f"{options.url} answers")
            has_answered = True
            print(clear + (json.dumps(state) if options.json else "\n".join(lines(state))), flush=True)
            if options.once:
                return 0
        time.sleep(options.interval)


def _say(what: str) -> None:
    print(f"connlimit-top: {_printable(what)}", file=sys.stderr)


def _interval(text: str) -> float:
    try:
        interval: float = SECONDS.of_text("--interval", text)
        return interval
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {SECONDS.in_text}, not {text!r}") from None


def fetch(url: str) -> dict[str, Any]:
    """
    What the status page at this URL tells.

    :raises OSError: if there is no answer.
    :raises ValueError: if it is something else.
    """
    with urlopen(url.rstrip("/") + "/status.json", timeout=10) as response:
        state = json.load(response)
    if not isinstance(state, dict) or "limiters" not in state:
        raise ValueError("this is not a status page")
    return state


def lines(state: dict[str, Any]) -> list[str]:
    """
    The status as lines of text.
    """
    shown = []
    for limiter in state["limiters"]:
        # A server of another version may have others.
        figures = {name: figure for name, figure in FIGURES.items() if name in limiter}
        flags = [figure.title for name, figure in figures.items() if figure.kind == FLAG and limiter[name]]
        shown.append(_printable(limiter["name"]) + "".join(f" ({flag})" for flag in flags))
        for name, figure in figures.items():
            if figure.setting:
                shown.append(_bar(figure.title, limiter[name], limiter.get(figure.setting)))
        told = {name: _told(figure, limiter[name]) for name, figure in figures.items()}
        now = [name for name, each in figures.items() if each.kind in (GAUGE, MAXIMUM) and not each.setting]
        so_far = [name for name, figure in figures.items() if figure.kind == COUNTER]
        shown += _wrapped("now", [told[name] for name in now])
        shown += _wrapped("waits", [f"{p} {value:.2f} s" for p, value in limiter["percentiles"].items()])
        shown += _wrapped("so far", [told[name] for name in so_far])
        for peer in limiter.get("peers", [])[:5]:
            shown.append(
                f"  peer     {_printable(peer['peer']):40} {peer['active']} served  {peer['waiting']} waiting"
            )
        shown.append("")
    descriptors = state["descriptors"]
    shown.append(
        f"descriptors {descriptors['open']} of {descriptors['limit']}   "
        f"reactor lag {state['reactor_lag'] * 1000:.0f} ms   "
        f"connlimit {_printable(str(state.get('version', '')))}"
    )
    return shown


def _told(figure: Figure, value: Any) -> str:
    """
    A figure in words.
    """
    if figure.label:
        counts = ", ".join(f"{count} {_printable(each)}" for each, count in value.items() if count)
        return f"{figure.title}: {counts or 'none'}"
    if value is None:
        return f"{figure.title}: unknown"
    return f"{figure.title}: {value:.2f} s" if figure.unit == "seconds" else f"{figure.title}: {value}"


def _wrapped(head: str, told: list[str]) -> list[str]:
    """
    What is told after a word, in lines that are not too long.
    """
    rows = [f"  {head:8}"]
    for each in told:
        if len(rows[-1]) + len(each) > _WIDTH:
            rows.append(" " * 10)
        rows[-1] += f" {each} "
    return [row.rstrip() for row in rows]


def _bar(word: str, value: int, maximum: int | None) -> str:
    filled = 0 if not maximum else round(_BAR * min(1.0, value / maximum))
    of = "no limit" if maximum is None else f"of {maximum}"
    return f"  {word:8} [{'#' * filled}{'.' * (_BAR - filled)}] {value} {of}"


def _printable(text: str) -> str:
    """
    The text without what would command a terminal.
    """
    return "".join(character if character.isprintable() else "?" for character in text)


if __name__ == "__main__":
    sys.exit(main())
