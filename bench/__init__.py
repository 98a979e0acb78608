"""
Benchmarks: what connlimit costs, measured on this machine, on loopback, by one command: python -m bench.
"""
