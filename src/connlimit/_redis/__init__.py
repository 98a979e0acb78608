"""
Connections to a Redis.
"""
