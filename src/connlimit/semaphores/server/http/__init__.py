"""
HTTP/1.1 for small requests and answers.
"""
