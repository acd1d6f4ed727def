"""OpenID Connect Discovery 1.0: where the issuer's endpoints are, and that they are the issuer's."""

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
    """Ask the issuer for its endpoints. Raises IssuerUnavailable, also for an issuer that is another's."""
    url = issuer + "/.well-known/openid-configuration"
    answer = session.get(url, deadline=deadline)
    document = answer.json()
    if answer.status != 200 or document is None:
        raise errors.IssuerUnavailable(
            f"{url} gave no description of an issuer ({answer.summary}); check XAI_PROXY_ISSUER, or try "
            "again later",
            retry_after=answer.retry_after,
        )
    named = document.get("issuer")
    if not isinstance(named, str) or named.rstrip("/") != issuer:
        raise errors.IssuerUnavailable(
            f"{url} does not describe {issuer} but {_shown(named)}; correct XAI_PROXY_ISSUER"
        )
    endpoints = {}
    for field in dataclasses.fields(Metadata)[1:]:
        endpoint = document.get(field.name)
        if endpoint is not None:
            check_endpoint(issuer, endpoint)
            endpoints[field.name] = endpoint
    if "token_endpoint" not in endpoints:
        raise errors.IssuerUnavailable(f"{url} names no token_endpoint; check XAI_PROXY_ISSUER")
    return Metadata(issuer, **endpoints)


def check_endpoint(issuer: str, url: object) -> None:
    """Raise IssuerUnavailable unless a credential of `issuer` may be sent to `url`, or a person.

    That takes https without a user part; for auth.x.ai also a host on *.x.ai. A loopback issuer may use http,
    on loopback.
    """
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        host, _ = parts.hostname or "", parts.port
        good = (
            re.fullmatch(r"[!-~]+", url)
            and addresses.is_authority(parts.netloc)
            and "\\" not in url
            and "#" not in url
        )
    except (TypeError, ValueError):
        good = False
    if good and issuer == config.DEFAULT_ISSUER:
        good = token_store.is_xai(url)
    elif good and parts.scheme == "http":
        good = addresses.is_loopback(host) and addresses.is_loopback(
            urllib.parse.urlsplit(issuer).hostname
        )
    elif good:
        good = parts.scheme == "https"
    if not good:
        wanted = "https on *.x.ai" if issuer == config.DEFAULT_ISSUER else "https"
        raise errors.IssuerUnavailable(
            f"{issuer} names the address {_shown(url)}, which is not {wanted} and "
            "is not used; check XAI_PROXY_ISSUER and the network"
        )


def _shown(value: object) -> str:
    """What an unknown server said, safe for a terminal and without a user part."""
    if not isinstance(value, str):
        return "nothing" if value is None else "something that is no text"
    return repr(re.sub(r"//[^/]*@", "//***@", value[:100]))
