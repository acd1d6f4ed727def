"""SOCKS 5, 4 and 4a: the negotiation with a proxy that is connected (RFC 1928, RFC 1929)."""

import socket
from typing import Any

SOCKS4, SOCKS5 = 1, 2  # PySocks' numbers, which urllib3 uses as well


def negotiate(
    sock: socket.socket,
    host: str,
    port: int,
    *,
    kind: int,
    rdns: bool,
    username: str | None,
    password: str | None,
) -> socket.socket:
    """Return a socket in place of `sock`, which is closed if that fails.

    `kind`: SOCKS4 or SOCKS5; `rdns`: whether the proxy resolves `host`. Raises OSError.
    """
    # The extra that a SOCKS proxy needs.
    import socks

    timeout = sock.gettimeout()
    through: Any = socks.socksocket(sock.family, sock.type, sock.proto, sock.detach())
    try:
        through.settimeout(timeout)
        through.set_proxy(kind, rdns=rdns, username=username, password=password)
        # The part of PySocks' connect that follows its TCP connection, which ignores RFC 8305.
        socks.socksocket._proxy_negotiators[kind](through, host, port)
        negotiated: socket.socket = through
        return negotiated
    except BaseException:
        through.close()
        raise
