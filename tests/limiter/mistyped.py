"""
Seven mistakes that a type checker has to find. It is checked, and not run.
"""

from connlimit import Limiter

limiter = Limiter(max_connections=100)
Limiter(max_conections=3)  # wrong
Limiter(wait_timeout="half an hour")  # wrong
limiter.max_conections = 4  # wrong
limiter.max_connections = "many"  # wrong
limiter.drian(3)  # wrong
limiter.reconfigure(oder="lifo")  # wrong
x: str = limiter.max_connections  # wrong
