"""
One HTTP request's life.
"""
