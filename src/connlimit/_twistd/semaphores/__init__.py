"""
``twistd connlimit-semaphores``.
"""
