"""
What can be limited by a command line or a file.
"""
