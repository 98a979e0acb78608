"""
Named semaphores over HTTP: how much of something is used at once, by programs in any language.
"""

from connlimit.semaphores.client import Lock, Peer, Semaphores
from connlimit.semaphores.http import SemaphoreError

__all__ = ["Lock", "Peer", "SemaphoreError", "Semaphores"]
