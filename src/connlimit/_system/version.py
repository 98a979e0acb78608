"""
The version of connlimit.
"""

__version__ = "0.1.0"
