"""
A slot for work of any kind: jobs, outgoing connections, requests to other servers.
"""
