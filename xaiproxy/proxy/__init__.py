"""Process 1: serves the endpoint, under gevent.

It never takes a lock and never sees a refresh token.
"""
