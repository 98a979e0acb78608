"""
The services of a `Config`: found and checked, opened and closed.
"""
