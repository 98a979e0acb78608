"""
Who is served, who waits and who is refused.
"""
