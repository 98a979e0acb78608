"""
Named semaphores over HTTP: how much of something is used at once, by programs in any language.
"""

from connlimit.semaphores.client import Semaphores
from connlimit.semaphores.http import SemaphoreError
from connlimit.semaphores.peer import Lock, Peer

__all__ = ["Lock", "Peer", "SemaphoreError", "Semaphores"]
