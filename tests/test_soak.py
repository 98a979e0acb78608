"""
Nothing is lost under random clients and a server that fails at random.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.patience import PATIENCE

SECONDS = 10


def test_ten_seconds_of_soak_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("soak.py")), "--seconds", str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=SECONDS + 2 * PATIENCE,
    )
    seed, *_, result = done.stdout.splitlines()
    assert done.returncode == 0, (seed, result)
    assert result.endswith("nothing is left behind")
