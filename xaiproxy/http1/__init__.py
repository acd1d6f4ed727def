"""HTTP/1.1 on gevent for any origin: messages, connections, and an exchange with upstream.

Knows no token and no Flask.
"""
