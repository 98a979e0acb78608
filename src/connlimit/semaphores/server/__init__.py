"""
A server of named semaphores: what it knows, where that is kept, and how it is asked over HTTP.
"""
