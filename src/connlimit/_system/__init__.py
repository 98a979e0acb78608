"""
What the system and every part of the program need.
"""
