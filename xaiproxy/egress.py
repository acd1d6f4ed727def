"""How both processes reach the internet: the proxy and the CA certificates.

Both are chosen once, from the environment, because the libraries' own choices disagree.
"""

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
    """The proxies and CA file, and the variables that they come from ("": none).

    `proxy`: for https. `http_proxy`: for plain http, which outside of loopback is used only for
    XAI_PROXY_NOTIFY_URL and OTEL_EXPORTER_OTLP_ENDPOINT.
    """

    proxy: str | None = dataclasses.field(default=None, repr=False)
    no_proxy: str = ""
    ca_file: str = dataclasses.field(default_factory=certifi.where)
    proxy_from: str = ""
    ca_from: str = ""
    http_proxy: str | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def from_environ(
        cls,
        environ: Mapping[str, str],
        complain: Callable[[errors.ConfigurationError], object],
        plain_http: bool = False,
    ) -> Egress:
        """`complain`: called with the error of each wrong variable, which is then ignored.

        `plain_http`: whether HTTP_PROXY is used. If not, a wrong one is no error.
        """

        def first(problem: Callable[[str], str], *names: str) -> tuple[str, str]:
            """The name and value of the first variable that is set."""
            for name in names:
                # Lower case wins, as in curl.
                for spelling in (name.lower(), name):
                    if text := environ.get(spelling):
                        quoted = setting_types.QUOTED.fullmatch(text)
                        wrong = setting_types.QUOTES_KEPT if quoted else problem(text)
                        if not wrong:
                            return spelling, text
                        complain(errors.ConfigurationError(f"{spelling} {wrong}", name))
                        return "", ""
            return "", ""

        proxy_from, proxy = first(_proxy_problem, "HTTPS_PROXY", "ALL_PROXY")
        http_proxy = first(_proxy_problem, "HTTP_PROXY", "ALL_PROXY")[1] if plain_http else ""
        ca_from, ca_file = first(_ca_problem, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        return cls(
            proxy=_with_scheme(proxy) if proxy else None,
            no_proxy=first(lambda text: "", "NO_PROXY")[1],
            ca_file=ca_file or certifi.where(),
            proxy_from=proxy_from,
            ca_from=ca_from,
            http_proxy=_with_scheme(http_proxy) if http_proxy else None,
        )

    def direct(self) -> Egress:
        """The same CA certificates without a proxy, for an address of the cluster's network."""
        return Egress(ca_file=self.ca_file, ca_from=self.ca_from)

    def proxy_for(self, url: str) -> str | None:
        """The proxy's URL for `url`, or None for a direct connection.

        It may hold a password: do not log it.
        """
        parts = urllib.parse.urlsplit(url)
        proxy = self.http_proxy if parts.scheme == "http" else self.proxy
        if proxy is None or addresses.is_loopback(parts.hostname):
            return None
        # typeshed lacks this function.
        bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
        return None if bypass(parts.netloc, {"no": self.no_proxy}) else proxy


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else "http://" + proxy


def _proxy_problem(text: str) -> str:
    """What is wrong with a proxy, or "", without its value, which may hold a password."""
    try:
        url = urllib.parse.urlsplit(_with_scheme(text))
        scheme = url.scheme if url.hostname and url.port != 0 else ""
    except ValueError:
        scheme = ""
    # GNOME and KDE write socks://.
    if scheme == "socks":
        return (
            "names a SOCKS proxy, but not its version: begin with socks5h:// for version 5, or "
            "socks4a:// for version 4"
        )
    if scheme not in ("http", "https", "socks5", "socks5h", "socks4", "socks4a"):
        return "must be the URL of a proxy, such as http://proxy.example:3128"
    if scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        return "names a SOCKS proxy, which requires xaiproxy[socks]: install that"
    return ""


def _ca_problem(text: str) -> str:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(text)
    # ssl.SSLError is an OSError.
    except OSError:
        return f"must be a file of PEM certificates, not {setting_types.shown(text)}"
    return ""
