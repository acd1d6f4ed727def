"""How both processes reach the world: the proxy and the CA certificates, from the environment."""

from __future__ import annotations

import dataclasses
import importlib.util
import ssl
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping

import certifi

from xaiproxy import addresses, errors, setting_types


@dataclasses.dataclass(frozen=True)
class Egress:
    """How we reach the world: one answer for both processes, since the libraries' own look-ups disagree.

    HTTP_PROXY has no say: plain http is spoken to loopback only, and loopback is never proxied. `proxy_from` and
    `ca_from` are the variables that the two come from, "" when there is none.
    """

    proxy: str | None = dataclasses.field(default=None, repr=False)
    no_proxy: str = ""
    ca_file: str = dataclasses.field(default_factory=certifi.where)
    proxy_from: str = ""
    ca_from: str = ""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], complain: Callable) -> Egress:
        def first(*names: str) -> tuple[str, str]:
            for name in names:
                for spelling in (name.lower(), name):  # lower case wins, as in curl
                    if text := environ.get(spelling):
                        return (
                            wrong(spelling, setting_types.QUOTES_KEPT)
                            if setting_types.QUOTED.fullmatch(text)
                            else (spelling, text)
                        )
            return "", ""

        def wrong(name: str, takes: str) -> tuple[str, str]:
            complain(errors.ConfigurationError(f"{name} {takes}", name.upper()))
            return "", ""

        name, proxy = first("HTTPS_PROXY", "ALL_PROXY")
        if proxy:
            proxy = proxy if "://" in proxy else "http://" + proxy
            if takes := _wrong_with_proxy(proxy):
                name, proxy = wrong(name, takes)
        ca_name, ca_file = first("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        if ca_file:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
            except OSError:  # SSLError is one
                ca_name, ca_file = wrong(
                    ca_name,
                    f"is {setting_types.shown(ca_file)}, but takes a file of PEM certificates",
                )
        return cls(
            proxy=proxy or None,
            no_proxy=first("NO_PROXY")[1],
            ca_file=ca_file or certifi.where(),
            proxy_from=name,
            ca_from=ca_name,
        )

    def proxy_for(self, url: str) -> str | None:
        """The proxy's URL for `url`, or None for a direct connection. It may hold a password: do not log it."""
        parts = urllib.parse.urlsplit(url)
        if self.proxy is None or parts.scheme == "http" or addresses.is_loopback(parts.hostname):
            return None
        if urllib.request.proxy_bypass_environment(parts.netloc, {"no": self.no_proxy}):
            return None
        return self.proxy


def _wrong_with_proxy(proxy: str) -> str:
    # The value may hold a password: it is not repeated in the error.
    try:
        url = urllib.parse.urlsplit(proxy)
        usable = bool(url.hostname) and (url.port or True)
    except ValueError:
        usable = False
    if usable and url.scheme == "socks":  # as GNOME and KDE set it
        return "names a SOCKS proxy, but not its version: begin with socks5h:// for version 5, or socks4a:// for 4"
    if not usable or url.scheme not in ("http", "https", "socks5", "socks5h", "socks4", "socks4a"):
        return "takes the URL of a proxy, such as http://proxy.example:3128"
    if url.scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        return "names a SOCKS proxy: install xaiproxy[socks] for that"
    return ""
