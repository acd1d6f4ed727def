"""A small simulated xAI on loopback: an authorization server and an API, to try, test and measure against.

Run it with ``xai-sandbox`` or ``python -m xaiproxy.sandbox``. It is strict where xAI is strict and shares
no code with the proxy, so that neither can hide a fault of the other.

Nothing here verifies a signature or protects anybody: its tokens are signed with a secret that dies with
the process, it approves whoever presses "allow", and it listens on loopback only.
"""
