"""Which header fields are forwarded, both ways (RFC 9110 section 7.6.1), and Via (section 7.6.3).

Pure functions.
"""

from __future__ import annotations

import re

from xaiproxy.http1.message_head import connection_options, normal_authority

Fields = list[tuple[str, str]]

HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
# Set by the proxy, up to Via; credentials, up to X-Goog-Api-Key; the rest describes the way to the
# proxy, not the request. Cloudflare, in front of api.x.ai, refuses requests that seem to come from
# another Cloudflare zone. Expect is answered by the proxy: it sends the body without waiting for
# upstream's 100.
NOT_SENT = HOP_BY_HOP | frozenset(
    (
        "authorization",
        "host",
        "user-agent",
        "content-length",
        "accept-encoding",
        "expect",
        "via",
        "api-key",
        "cookie",
        "x-api-key",
        "x-goog-api-key",
        "cdn-loop",
        "fastly-client-ip",
        "fly-client-ip",
        "forwarded",
        "referer",
        "true-client-ip",
        "x-amzn-trace-id",
        "x-azure-clientip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-real-ip",
    )
)
PREFIXES_NOT_SENT = (
    "cf-",
    "proxy-",
    "remote-",
    "tailscale-user-",
    "x-amzn-oidc-",
    "x-auth-request-",
    "x-envoy-",
    "x-forwarded-",
    "x-goog-iap-",
    "x-ms-client-principal",
    "x-original-",
    "x-remote-",
)
# Of responses, trailers included: what a client would apply to the proxy's own origin, and the
# proxy's own X-XAI-Proxy-Error.
NOT_PASSED = HOP_BY_HOP | frozenset(
    (
        "set-cookie",
        "alt-svc",
        "clear-site-data",
        "nel",
        "report-to",
        "reporting-endpoints",
        "strict-transport-security",
        "x-xai-proxy-error",
    )
)
# An absolute or network-path reference (RFC 3986 section 4.2) to what this proxy serves, if the
# authority is upstream's.
LOCATION = re.compile(
    r"(\r\n(?:content-)?location:[ \t]*)(?:(https?):)?//([^/?#\r]*)(?=/v[12]/)", re.IGNORECASE
)
CODINGS = re.compile(
    r"(?<![^,])[ \t]*((?:gzip|deflate|identity)[ \t]*(?:;[^,]*)?)(?![^,])", re.IGNORECASE
)
VIA_MEMBER = re.compile(r"(?<![^, \t])1\.1 xaiproxy-[0-9a-f]{16}(?=[ \t]*(?:,|\Z))")


def to_upstream(
    fields: Fields, *, host: str, user_agent: str, access_token: str, pseudonym: str = ""
) -> Fields:
    """The fields of the request to upstream, except the framing of its body.

    `pseudonym`: the name of this proxy in Via, xaiproxy- and 16 hex digits; "" to send no Via.
    """
    names = [name.lower() for name, _ in fields]
    options: set[str] = set()
    if "connection" in names:
        pairs = zip(names, fields, strict=True)
        options = connection_options(
            ",".join([field[1] for name, field in pairs if name == "connection"])
        )
    sent = [("Host", host), ("User-Agent", user_agent), ("Authorization", "Bearer " + access_token)]
    accepted: list[str] = []
    received_via: list[str] = []
    for name, field in zip(names, fields, strict=True):
        if name in options:
            continue
        if name not in NOT_SENT and not name.startswith(PREFIXES_NOT_SENT):
            sent.append(field)
        elif name == "accept-encoding":
            accepted.append(field[1])
        elif name == "via":
            received_via.append(field[1])
    if accepted:
        sent.insert(3, ("Accept-Encoding", _reduced(",".join(accepted))))
    if pseudonym:
        sent.append(("Via", _via(",".join(received_via), pseudonym)))
    return sent


def _via(received: str, pseudonym: str) -> str:
    """Only the members that reveal a loop of such proxies: all others are private to the client."""
    members = VIA_MEMBER.findall(received)
    return ", ".join([*members, "1.1 " + pseudonym])


def _reduced(accept_encoding: str) -> str:
    """Only codings in which the proxy can read an error; a response itself is never decoded."""
    kept = [item.rstrip(" \t") for item in CODINGS.findall(accept_encoding)]
    return ", ".join(kept) or "identity"


def to_client(lines: str, values: dict[str, list[str]], *, length: int | None, origin: str) -> str:
    """The header lines of the response to the client, each preceded by its CRLF.

    `lines`: upstream's, except NOT_PASSED; `values`: at least those of response_head.READ;
    `length`: body length, or None if unknown. Content-Length is sent if upstream sent one, and
    once. `origin`: upstream's.
    """
    dropped: set[str] = set()
    if "connection" in values:
        dropped = (
            connection_options(",".join(values["connection"]))
            - NOT_PASSED
            - {"content-length", "close"}
        )
    lengths = values.get("content-length")
    end = ""
    if lengths is not None and lengths != [str(length)]:
        dropped |= {"content-length"}
        end = "" if length is None else f"\r\nContent-Length: {length}"
    if dropped:
        lines = "\r\n".join(
            [line for line in lines.split("\r\n") if line.partition(":")[0].lower() not in dropped]
        )
    if "location" in values or "content-location" in values:
        lines = LOCATION.sub(
            lambda match: match[1] if _is_at(origin, match[2], match[3]) else match[0], lines
        )
    if "x-accel-buffering" not in values and media_type(values) == "text/event-stream":
        # Without it an nginx in front of the proxy holds events back until it has 4 KB.
        end += "\r\nX-Accel-Buffering: no"
    return lines + end


def media_type(values: dict[str, list[str]]) -> str:
    """The media type of Content-Type in lower case, or "" if there is none."""
    types = values.get("content-type")
    return types[0].partition(";")[0].strip().lower() if types else ""


def _is_at(origin: str, scheme: str | None, authority: str) -> bool:
    """Whether a reference is to `origin`. `scheme`: None if the reference has none."""
    own_scheme, _, own_authority = origin.partition("://")
    scheme = (scheme or own_scheme).lower()
    return scheme == own_scheme and normal_authority(scheme, authority) == normal_authority(
        scheme, own_authority
    )
