"""SOCKS 5, 4 and 4a: the negotiation on a socket that is connected to a proxy (RFC 1928, RFC 1929)."""

import socket

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

    `kind`: SOCKS4 or SOCKS5; `rdns`: whether the proxy looks `host` up. Raises OSError.
    """
    import socks  # the extra that a SOCKS proxy needs

    timeout = sock.gettimeout()
    through = socks.socksocket(sock.family, sock.type, sock.proto, sock.detach())
    try:
        through.settimeout(timeout)
        through.set_proxy(kind, rdns=rdns, username=username, password=password)
        # What its connect does once it is connected, which it would do without regard to RFC 8305.
        socks.socksocket._proxy_negotiators[kind](through, host, port)
        return through
    except BaseException:
        through.close()
        raise
