"""Connections for requests: to the first address that answers (RFC 8305), with our own TLS context.

The same goes for the addresses of a proxy. urllib3 itself tries one address after the other, each
with the whole timeout, and which certificates its own context accepts depends on Python's version.
"""

import socket
import ssl
from typing import Any

import requests
import urllib3

from xaiproxy import addresses, socks_proxy


class _Connects:
    """Mixin for the connections of urllib3, which set the attributes declared here.

    `_socks_options`: as urllib3's SOCKSProxyManager passes them.
    """

    host: str
    port: int
    timeout: Any
    socket_options: Any
    _dns_host: str

    def __init__(
        self, *arguments: Any, _socks_options: dict[str, Any] | None = None, **keywords: Any
    ):
        super().__init__(*arguments, **keywords)
        self._socks = _socks_options

    def _new_conn(self) -> socket.socket:
        if self._socks is None:
            return self._connect(self._dns_host, self.port)
        proxy = self._socks
        sock = self._connect(proxy["proxy_host"], proxy["proxy_port"] or 1080)
        return socks_proxy.negotiate(
            sock,
            self.host,
            self.port,
            kind=proxy["socks_version"],
            rdns=proxy["rdns"],
            username=proxy["username"],
            password=proxy["password"],
        )

    def _connect(self, host: str, port: int) -> socket.socket:
        found = addresses.look_up(host.strip("[]"), port)
        return addresses.connect(found, self.timeout, self.socket_options or ())[0]


class _HTTPConnection(_Connects, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Connects, urllib3.connection.HTTPSConnection):
    def __init__(self, *arguments: Any, **keywords: Any):
        # The context holds the CA certificates. urllib3 would parse the file again, in 40 ms.
        super().__init__(*arguments, **{**keywords, "ca_certs": None})


class _HTTPConnectionPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSConnectionPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


POOLS = {"http": _HTTPConnectionPool, "https": _HTTPSConnectionPool}


class Adapter(requests.adapters.HTTPAdapter):
    """`context`: for TLS to the server and to an https proxy; None where there is no TLS."""

    def __init__(self, context: ssl.SSLContext | None):
        self._context = context
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(*arguments, ssl_context=self._context, **keywords)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def proxy_manager_for(self, proxy: str, **keywords: Any) -> Any:
        if proxy.startswith("https:"):
            keywords["proxy_ssl_context"] = self._context
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **keywords)
        manager.pool_classes_by_scheme = POOLS
        return manager
