"""A small simulated xAI on loopback: an authorization server and an API, for trials and tests.

Run it with ``xai-sandbox`` or ``python -m xaiproxy.sandbox``. It is strict where xAI is strict, and
shares no code with the proxy, so that neither hides a bug of the other.

It provides no security: its tokens are signed with a random secret of the process, signatures are
not verified, and anyone can press "allow". So it listens on loopback only.
"""
