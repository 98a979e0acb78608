"""
A program that is several processes: a parent and its workers.
"""
