"""A new connection to upstream: its addresses in turn, a proxy on the way (CONNECT or SOCKS), and TLS."""

import base64
import socket
import ssl
import time
import urllib.parse
from typing import Any

from xaiproxy import config, response_head
from xaiproxy.connection import Connection, TLSConnection

# Dead peers behind a silent network are noticed within two minutes.
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
             (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)]
SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEPALIVE]
REMEMBERED = 60  # seconds that what a name server said is used again
PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080, "socks4a": 1080}


class Dialler:
    def __init__(self, settings: config.Config):
        self._upstream = urllib.parse.urlsplit(settings.upstream)
        proxy = settings.egress.proxy_for(settings.upstream)
        self._proxy = urllib.parse.urlsplit(proxy) if proxy else None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # one for all: it holds the parsed CA certificates
        self._context.load_verify_locations(settings.egress.ca_file)
        self._session: "ssl.SSLSession | None" = None
        self._addresses: "list[Any]" = []  # what getaddrinfo said, the one that was reached last in front
        self._looked_up = 0.0

    def connect(self) -> Connection:
        """Raises OSError, EOFError, Malformed. Without a time limit of its own."""
        connection = self._reach()
        try:
            if self._proxy is not None and self._proxy.scheme in ("http", "https"):
                if self._proxy.scheme == "https":
                    connection = TLSConnection(connection, self._context, self._proxy.hostname)
                    connection.shake_hands()
                self._tunnel(connection)
            if self._upstream.scheme == "https":
                connection = TLSConnection(connection, self._context, self._upstream.hostname, self._session)
                connection.shake_hands()
            return connection
        except BaseException:
            connection.close()
            raise

    def answered(self, connection: Connection) -> None:
        """To be called when a new connection has brought its first answer: the next one need not shake hands in full."""
        if isinstance(connection, TLSConnection) and not connection.session_reused:  # to ask for it costs a lot
            self._session = connection.session

    def _reach(self) -> Connection:
        target = self._proxy or self._upstream
        port = target.port or PORTS[target.scheme]
        if target.scheme.startswith("socks"):
            return Connection(_through_socks(target, port, _address(self._upstream)))
        return Connection(self._dial(target.hostname, port))

    def _dial(self, host: str, port: int) -> socket.socket:
        if not self._addresses or time.monotonic() - self._looked_up > REMEMBERED:
            # Bytes, since text would be taken through IDNA, which has its own errors.
            self._addresses = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
            self._looked_up = time.monotonic()
        last = OSError("its name has no address")
        for known in self._addresses:
            family, kind, protocol, _, address = known
            sock = socket.socket(family, kind, protocol)
            try:
                _prepare(sock)
                sock.connect(address)
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
                last = error
            else:
                self._addresses = [known, *(other for other in self._addresses if other != known)]
                return sock
        self._addresses = []
        raise last

    def _tunnel(self, connection: Connection) -> None:
        """RFC 9110 section 9.3.6."""
        host, port = _address(self._upstream)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        if self._proxy.username is not None:
            user = urllib.parse.unquote_to_bytes(self._proxy.username)
            password = urllib.parse.unquote_to_bytes(self._proxy.password or "")
            request += f"Proxy-Authorization: Basic {base64.b64encode(user + b':' + password).decode()}\r\n"
        connection.send_all(request.encode() + b"\r\n")
        answer = None
        while answer is None or answer.status < 200:
            head = connection.recv_head(response_head.SIZE_LIMIT, 600)
            if not head:
                raise EOFError
            answer = response_head.parse(head, "CONNECT")
        if answer.status >= 300:
            raise OSError(f"the proxy on the way answered {answer.status} {answer.reason}")


def _address(url: urllib.parse.SplitResult) -> "tuple[str, int]":
    return url.hostname, url.port or PORTS[url.scheme]


def _prepare(sock: socket.socket) -> None:
    for option in SOCKET_OPTIONS:
        sock.setsockopt(*option)


def _through_socks(proxy: urllib.parse.SplitResult, port: int, address: "tuple[str, int]") -> socket.socket:
    import socks  # the extra that a SOCKS proxy needs

    sock = socks.socksocket()
    try:
        _prepare(sock)
        sock.set_proxy(socks.SOCKS4 if proxy.scheme.startswith("socks4") else socks.SOCKS5, proxy.hostname, port,
                       rdns=proxy.scheme in ("socks5h", "socks4a"),
                       username=proxy.username and urllib.parse.unquote(proxy.username),
                       password=proxy.password and urllib.parse.unquote(proxy.password))
        sock.connect(address)
        return sock
    except BaseException:
        sock.close()
        raise
