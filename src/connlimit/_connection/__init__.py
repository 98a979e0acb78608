"""
One connection's life.
"""
