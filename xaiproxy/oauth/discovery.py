"""OpenID Connect Discovery 1.0: find the issuer's endpoints, and check them."""

import dataclasses
import re
import urllib.parse

from xaiproxy import addresses, config, errors, token_store
from xaiproxy.oauth.session import Session


@dataclasses.dataclass(frozen=True)
class Metadata:
    issuer: str
    token_endpoint: str
    authorization_endpoint: str | None = None
    device_authorization_endpoint: str | None = None
    revocation_endpoint: str | None = None


def discover(session: Session, issuer: str, *, deadline: float = 30.0) -> Metadata:
    """Fetch and check the issuer's discovery document. Raises IssuerUnavailable."""
    url = issuer + "/.well-known/openid-configuration"
    answer = session.get(url, deadline=deadline)
    document = answer.json()
    if answer.status != 200 or document is None:
        raise errors.IssuerUnavailable(
            f"{url} returned no discovery document ({answer.summary}); check XAI_PROXY_ISSUER, "
            "or try again later",
            retry_after=answer.retry_after,
        )
    named = document.get("issuer")
    if not isinstance(named, str) or named.rstrip("/") != issuer:
        raise errors.IssuerUnavailable(
            f"{url} is for the issuer {_shown(named)}, not {issuer}; correct XAI_PROXY_ISSUER"
        )
    endpoints = {}
    for field in dataclasses.fields(Metadata)[1:]:
        endpoint = document.get(field.name)
        if endpoint is not None:
            endpoints[field.name] = check_endpoint(issuer, endpoint)
    if "token_endpoint" not in endpoints:
        raise errors.IssuerUnavailable(f"{url} names no token_endpoint; check XAI_PROXY_ISSUER")
    return Metadata(issuer, **endpoints)


def check_endpoint(issuer: str, url: object) -> str:
    """Raise IssuerUnavailable unless a credential of `issuer`, or a person, may be sent to `url`.

    That takes https without a user part, and for auth.x.ai a host on *.x.ai. A loopback issuer may
    use http on loopback.
    """
    if isinstance(url, str) and _is_allowed(issuer, url):
        return url
    wanted = "https on *.x.ai" if issuer == config.DEFAULT_ISSUER else "https"
    raise errors.IssuerUnavailable(
        f"{issuer} names the address {_shown(url)}, which is not {wanted} and is not used; "
        "check XAI_PROXY_ISSUER and the network"
    )


def _is_allowed(issuer: str, url: str) -> bool:
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url or "#" in url:
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return False
    if not addresses.is_authority(parts.netloc):
        return False
    if issuer == config.DEFAULT_ISSUER:
        return token_store.is_xai(url)
    if parts.scheme == "http":
        issuer_host = urllib.parse.urlsplit(issuer).hostname
        return addresses.is_loopback(host) and addresses.is_loopback(issuer_host)
    return parts.scheme == "https"


def _shown(value: object) -> str:
    """Text of an unknown server, safe for a terminal and without a user part."""
    if not isinstance(value, str):
        return "(none)" if value is None else "(not a string)"
    return repr(re.sub(r"//[^/]*@", "//***@", value[:100]))
