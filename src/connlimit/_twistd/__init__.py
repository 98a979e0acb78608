"""
What twistd runs.
"""
