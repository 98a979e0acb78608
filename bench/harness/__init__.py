"""
What the benchmarks are made with.
"""
