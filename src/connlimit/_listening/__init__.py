"""
Where connections come from.
"""
