"""The causes of a failed request to the issuer, and a sentence about them."""

import http.client
import re
import socket
import ssl
import urllib.parse
from collections.abc import Iterator
from typing import Any

import requests
import urllib3

from xaiproxy import trust
from xaiproxy.egress import Egress

BODY_LIMIT = 1 << 20  # bytes of a response


def explain(error: Exception, url: str, egress: Egress, deadline: float, address_from: str) -> str:
    """One sentence. It does not quote the exceptions: they may contain the proxy's password."""
    host = urllib.parse.urlsplit(url).netloc
    causes = list(causes_of(error))
    parts = urllib.parse.urlsplit(egress.proxy_for(url) or "")
    proxy = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname

    def find(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if certificate := find(ssl.SSLCertVerificationError):
        return f"the certificate of {host} cannot be verified {trust.refusal(certificate, egress)}"
    if find(requests.exceptions.ProxyError):
        status = re.search(r"Tunnel connection failed: ([0-9]{3})", " ".join(map(str, causes)))
        shown = f" (HTTP {status[1]})" if status else ""
        return (
            f"could not reach {host} through the proxy {proxy}{shown}; "
            "check HTTPS_PROXY and NO_PROXY"
        )
    if proxy:
        host += f" (through the proxy {proxy})"
    if find(socket.gaierror):
        return f"the name {host} cannot be resolved; check the network, or set HTTPS_PROXY"
    if find(urllib3.exceptions.ResponseError):
        return f"the response of {host} is longer than {BODY_LIMIT} bytes; check {address_from}"
    if find(ConnectionResetError, BrokenPipeError, http.client.HTTPException):
        return f"{host} closed the connection before its response was complete; try again"
    if tls := find(ssl.SSLError):
        return f"the TLS handshake with {host} failed ({tls.reason}); check the network"
    if system := next(
        (cause for cause in causes if isinstance(cause, OSError) and cause.strerror), None
    ):
        return f"{host} cannot be reached ({system.strerror}); check the network, or {address_from}"
    if find(TimeoutError, urllib3.exceptions.TimeoutError):
        return (
            f"{host} sent no complete response within {deadline:g} s; check the network, "
            "and try again"
        )
    return f"the response of {host} could not be read ({type(error).__name__}); try again"


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The exception and all inside it.

    urllib3 and requests keep those in `args`, `reason`, `__cause__` or `__context__`.
    """
    pending: list[object] = [error]
    seen = set()
    while pending:
        cause = pending.pop(0)
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            reason = getattr(cause, "reason", None)
            pending += [reason, *cause.args, cause.__cause__, cause.__context__]
