"""
Right and wrong values of each setting.
"""

from __future__ import annotations

from connlimit import refusals
from connlimit._limiter.peers import exempt_or_none

#: For each setting: a value, the same as text, and wrong values in code and as text.
VALUES: dict[str, tuple[object, str, list[object], list[str]]] = {
    "max_connections": (100, "100", [-1, 1.5, "1", True], ["-1", "1.5", "many", ""]),
    "max_per_peer": (5, "5", [0, -1, "5"], ["0", "-1", "x"]),
    "peer_prefix": (
        (24, 56),
        "24,56",
        [(33, 64), (32, 129), (-1, 0), 24, (1, 2, 3), "24"],
        ["33,64", "24", "a,b"],
    ),
    "over_peer": ("refuse", "refuse", ["reject", None, 1], ["reject", ""]),
    "max_rate": (2.5, "2.5", [0, -1, float("inf"), float("nan"), "2"], ["0", "-1", "nan", "fast"]),
    "max_burst": (7, "7", [0, -1, 1.5], ["0", "-1", "1.5"]),
    "max_waiting": (None, "none", [-1, "none"], ["-1", "lots"]),
    "wait_timeout": (30, "30", [0, -1, float("nan"), "30"], ["0", "-3", "30x", "s"]),
    "order": ("adaptive", "adaptive", ["random", None, 5], ["random", ""]),
    "adaptive_target": (0.1, "0.1", [0, None, "x"], ["0", "none"]),
    "adaptive_interval": (5, "5", [0, -1, None], ["-1", "none"]),
    "departed_on_half_close": (True, "yes", [1, "yes", None], ["perhaps", ""]),
    "notice": (
        (5, b"wait\r\n"),
        r"5s wait\r\n",
        [(0, b"x"), (5, "text"), (5, b""), 5, (5,)],
        ["now wait", "0 wait", "5", "5 ", ""],
    ),
    "idle_timeout": (60, "60", [0, -1], ["0", "x"]),
    "exempt": (
        exempt_or_none(["127.0.0.0/8", "::1"]),
        "127.0.0.0/8, ::1",
        ["127.0.0.1", ["127.0.0.1/33"], ["host"], 5, [5]],
        ["host", "127.0.0.1/8", "127.0.0.0/8,localhost", "", ","],
    ),
    "refusal": (refusals.HTTP, "http", ["htpp", "say ", 5, None], ["htpp", "say", "say ", ""]),
    "dry_run": (True, "on", ["on", 1], ["maybe"]),
    "log": (False, "no", ["no", 0, None], ["maybe"]),
    "name": ("web", "web", ["", 5], [""]),
}
