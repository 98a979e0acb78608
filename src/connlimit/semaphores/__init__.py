"""
Named semaphores over HTTP: how much of something is used at once, by programs in any language.
"""

from connlimit.semaphores._client import Lock, Peer, SemaphoreError, Semaphores

__all__ = ["Lock", "Peer", "SemaphoreError", "Semaphores"]
