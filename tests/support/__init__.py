"""
What several test modules share, by subject.
"""

from __future__ import annotations

from support.applications import ECHO
from support.clients import free_port, page_until, read_all
from support.logs import Log
from support.patience import PATIENCE
from support.programs import Program, failing, require_program, running, twistd_command
from support.tls import make_certificate, talk_tls

__all__ = [
    "ECHO",
    "PATIENCE",
    "Log",
    "Program",
    "failing",
    "free_port",
    "make_certificate",
    "page_until",
    "read_all",
    "require_program",
    "running",
    "talk_tls",
    "twistd_command",
]
