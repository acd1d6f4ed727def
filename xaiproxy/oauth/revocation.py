"""RFC 7009, token revocation: end a login at the issuer."""

import urllib.parse

from xaiproxy import errors, tokens
from xaiproxy.oauth import discovery, token_endpoint
from xaiproxy.oauth.session import Session


def revoke(
    session: Session, metadata: discovery.Metadata, login: tokens.Login, *, deadline: float = 15.0
) -> None:
    """Revoke the refresh token, and with it all tokens of the same grant (section 2.1).

    A token that the issuer does not know counts as revoked (section 2.2). Raises IssuerUnavailable
    or OAuthError.
    """
    if metadata.revocation_endpoint is None:
        raise errors.IssuerUnavailable(f"{metadata.issuer} offers no revocation")
    form = {
        "token": login.refresh_token or login.access_token,
        "token_type_hint": "refresh_token" if login.refresh_token else "access_token",
        "client_id": login.client_id,
    }
    answer = session.post(metadata.revocation_endpoint, form, deadline)
    if answer.status != 200 or answer.is_html:
        raise token_endpoint.refusal(
            answer, urllib.parse.urlsplit(metadata.revocation_endpoint).netloc, form
        )
