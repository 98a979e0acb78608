"""
How long a test waits for what must come.
"""

from __future__ import annotations

#: How long anything on this machine may take before a test gives up, in seconds.
PATIENCE = 30.0
