"""Who may call: a client key, or a caller that no web page can imitate.

Without a valid key the proxy must not serve a browser's page on another site, which would spend the
subscription (cross-site requests) or read its answers (DNS rebinding). So Host must be a name that
no foreign DNS record can point here, Sec-Fetch-Site must not name another site, and Origin must be
the proxy's own or a listed one.
"""

from __future__ import annotations

import re
import socket

from xaiproxy import client_keys, config, errors
from xaiproxy.http1.request_head import Head
from xaiproxy.proxy import sent_keys

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9._-]*)(:[0-9]{0,5})?")
# Where browsers send Sec-Fetch-Site also over plain HTTP: "potentially trustworthy" (Secure
# Contexts, section 3.1).
TRUSTWORTHY = re.compile(
    r"(([a-z0-9_-]+\.)*localhost|127\.[0-9.]+|\[::1\])(:[0-9]*)?", re.IGNORECASE
)
CONTAINER_HOSTS = frozenset(("host.docker.internal", "host.containers.internal"))
OWN_SITES = frozenset(("same-origin", "none"))
IPV4_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2
PAGE_MARK = "xaiproxy"  # the X-Requested-With of the status page's script
PREFLIGHT_AGE = 600  # seconds that a browser may remember a preflight


class Access:
    def __init__(self, settings: config.Config, keys: client_keys.ClientKeys):
        self._hosts = settings.allowed_hosts
        self._origins = settings.allowed_origins
        self._keys = keys

    def check(self, head: Head, *, key_needed: bool) -> str | None:
        """Return the name of the client key that was shown, if any.

        `key_needed`: whether a key is required if there are any (the API), or the rules for web
        pages are enough. Raises HostNotAllowed, OriginNotAllowed, ClientKeyRequired.
        """
        self._keys.refresh()
        name = self._key_name(head)
        if name is None:
            self._check_host(head)
            self._check_origin(head)
            if key_needed and self._keys.required:
                raise errors.ClientKeyRequired(self._refusal(head))
        return name

    def admits_nobody(self) -> bool:
        """Whether a key is required and there is none."""
        self._keys.refresh()
        return self._keys.admits_nobody

    def _key_name(self, head: Head) -> str | None:
        for key in sent_keys.of(head):
            name = self._keys.name_of(key)
            if name is not None:
                return name
        return None

    def _refusal(self, head: Head) -> str:
        """The message for a request without a valid key.

        Claude Code shows "Not logged in" instead of any message that names x-api-key.
        """
        if self._keys.admits_nobody:
            return (
                "this proxy has no client key that can be used, so it refuses every request; "
                "its log has the reason"
            )
        faults = sent_keys.faults(head)
        if sent_keys.of(head):
            advice = "`xai-client-key list` shows their names, `xai-client-key add NAME` makes one"
        else:
            advice = "send `Authorization: Bearer KEY`; `xai-client-key add NAME` makes one"
        return f"{' and '.join(faults) or 'this proxy needs a client key'}; {advice}"

    def _key_advice(self, head: Head) -> str:
        """The advice to send a key, with what is wrong with the one that was sent."""
        faults = sent_keys.faults(head) if self._keys.required else []
        return "send a client key" + (f" ({' and '.join(faults)})" if faults else "")

    def _check_host(self, head: Head) -> None:
        host = "".join(head.values("host"))
        match = HOST.fullmatch(host)
        if match is None:
            raise errors.HostNotAllowed(
                f"the Host {host[:100]!r} is not a name or an address; use localhost, or "
                + self._key_advice(head)
            )
        name = match[1].lower().removesuffix(".")
        if not self._is_ours(name):
            raise errors.HostNotAllowed(
                f"the Host {host[:100]!r} is not a known name of this proxy; if it is one, add "
                f"{name[:100]} to XAI_PROXY_ALLOWED_HOSTS, or {self._key_advice(head)}"
            )

    def _is_ours(self, name: str) -> bool:
        if name in self._hosts:
            return True
        if name.startswith("["):
            return _is_address(name[1:-1])
        return (
            name == "localhost"
            or name.endswith(".localhost")
            or "." not in name
            or _is_address(name)
            or name in CONTAINER_HOSTS
        )

    def _check_origin(self, head: Head) -> None:
        origins = [value.lower() for value in head.values("origin")]
        sites = [value.lower() for value in head.values("sec-fetch-site")]
        if not origins and not sites:
            if _may_be_of_any_page(head):
                raise errors.OriginNotAllowed(
                    "under this Host a browser does not name the page that its GET is for; use "
                    f"localhost, or {self._key_advice(head)}"
                )
            return
        if len(origins) == 1 and origins[0] in self._origins:
            return
        own = {
            f"{scheme}://{host.lower().removesuffix(':')}"
            for scheme in ("http", "https")
            for host in head.values("host")
        }
        if len(origins) > 1 or not own.issuperset(origins) or not OWN_SITES.issuperset(sites):
            # The origin of any sandboxed page is null, which cannot be listed.
            origin = origins[0][:200] if origins and origins[0] != "null" else "the page's origin"
            raise errors.OriginNotAllowed(
                "web pages of other sites may not call this proxy; to allow this one, add "
                f"{origin} to XAI_PROXY_ALLOWED_ORIGINS"
            )

    def cors_headers(self, head: Head) -> list[tuple[str, str]]:
        """The CORS header fields for a page of a listed origin; none for others."""
        origins = head.values("origin")
        if len(origins) != 1 or origins[0].lower() not in self._origins:
            return []
        return [("Access-Control-Allow-Origin", origins[0]), ("Vary", "Origin")]

    def preflight(self, head: Head) -> list[tuple[str, str]] | None:
        """The header fields of the response to a CORS preflight; None if it is not a preflight.

        A preflight has no client key, even if the page has one: only listed origins are allowed.
        Raises OriginNotAllowed.
        """
        if not is_preflight(head):
            return None
        origins, methods = head.values("origin"), head.values("access-control-request-method")
        fields = self.cors_headers(head)
        if not fields:
            raise errors.OriginNotAllowed(
                f"web pages of {origins[0][:200]} may not call this proxy; to allow them, add it "
                "to XAI_PROXY_ALLOWED_ORIGINS"
            )
        fields += [
            ("Access-Control-Allow-Methods", methods[0]),
            ("Access-Control-Max-Age", str(PREFLIGHT_AGE)),
        ]
        wanted = head.values("access-control-request-headers")
        if wanted:
            fields.append(("Access-Control-Allow-Headers", wanted[0]))
        if head.values("access-control-request-private-network") == ["true"]:
            fields.append(("Access-Control-Allow-Private-Network", "true"))
        return fields


def is_preflight(head: Head) -> bool:
    return head.method == "OPTIONS" and bool(
        head.values("origin") and head.values("access-control-request-method")
    )


def _may_be_of_any_page(head: Head) -> bool:
    """Whether a browser may have sent this for the <img> of a page that it does not name.

    With a GET it sends no Origin, and Sec-Fetch-Site only over TLS or to what it knows as loopback.
    """
    return (
        head.method in ("GET", "HEAD")
        and any(value.startswith("Mozilla/") for value in head.values("user-agent"))
        and TRUSTWORTHY.fullmatch("".join(head.values("host"))) is None
        # A navigation to the status page's shell, which has no data and no effect.
        and not (head.path == "/" and head.values("upgrade-insecure-requests"))
        # Its script sends this value, which an <img> cannot, and another site's script only after a
        # preflight. Android's WebView adds the name of its app to requests of all pages.
        and head.values("x-requested-with") != [PAGE_MARK]
    )


def _is_address(name: str) -> bool:
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        packed = socket.inet_pton(family, name)
    except OSError:
        return False
    # The unspecified address and IPv4-mapped ones lead to loopback too, which browsers do not know:
    # a request of an <img> to them has neither Origin nor Sec-Fetch-Site.
    return any(packed) and not (len(packed) == 16 and packed.startswith(IPV4_MAPPED))
