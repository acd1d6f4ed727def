"""RFC 6749 section 4.1 with PKCE (RFC 7636) and a loopback redirect (RFC 8252 section 7.3).

    with loopback.Listener(settings.redirect_port, issuer) as listener:
        attempt = Attempt.begin(listener.redirect_uri)
        show authorization_url(metadata, settings, attempt)
        code = listener.wait(attempt.state, ...)       blocks
        login = exchange(session, metadata, settings, attempt, code)

After GrantRefused, wait again: the page can show another code.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import re
import secrets
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from xaiproxy import config, errors, provider, tokens
from xaiproxy.oauth import discovery, token_endpoint
from xaiproxy.oauth.session import Session

TRIES = 3  # for the exchange: if it fails, the user has to approve again
PAUSE = 2.0  # seconds between two tries
MIN_CODE_LENGTH = 8  # characters; a word typed by mistake is usually shorter than a code
# A URL, or the query of one. A code may end in =, as base64 does.
URL_OR_QUERY = re.compile(r"://|^\?|(^|\?)[a-z_]+=[^=&]")


class InvalidResponse(ValueError):
    """Not the authorization response to this attempt, with the reason; that may still arrive."""


class Incomplete(InvalidResponse):
    """The beginning of the authorization response; further text may complete it."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt to sign in.

    `state` binds the redirect to it, `nonce` the id_token, and `verifier` the code.
    """

    redirect_uri: str
    state: str = dataclasses.field(repr=False)
    nonce: str = dataclasses.field(repr=False)
    verifier: str = dataclasses.field(repr=False)

    @classmethod
    def begin(cls, redirect_uri: str) -> Attempt:
        return cls(
            redirect_uri,
            state=secrets.token_urlsafe(32),
            nonce=secrets.token_urlsafe(32),
            verifier=secrets.token_urlsafe(64),
        )

    def code_challenge(self) -> str:
        """S256 (RFC 7636 section 4.2)."""
        return (
            base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest())
            .rstrip(b"=")
            .decode()
        )


def authorization_url(
    metadata: discovery.Metadata, settings: config.Config, attempt: Attempt
) -> str:
    """The URL of the consent page."""
    if metadata.authorization_endpoint is None:
        raise errors.IssuerUnavailable(
            f"{metadata.issuer} offers no browser login; use " + errors.typed("xai-login --device")
        )
    if provider.is_xai(settings.client_id, settings.issuer):
        # Without this plan, xAI's consent page used to refuse loopback redirects. The referrer is
        # the program that signs in.
        more = {"plan": "generic", "referrer": "xaiproxy"}
    elif "offline_access" in settings.scope.split():
        # OpenID Connect Core section 11: that scope is ignored without it.
        more = {"prompt": "consent"}
    else:
        more = {}
    query = urllib.parse.urlencode(
        {
            "response_type": "code",
            "client_id": settings.client_id,
            "redirect_uri": attempt.redirect_uri,
            "scope": settings.scope,
            "state": attempt.state,
            "nonce": attempt.nonce,
            "code_challenge": attempt.code_challenge(),
            "code_challenge_method": "S256",
            **more,
        },
        quote_via=urllib.parse.quote,
    )
    return (
        metadata.authorization_endpoint
        + ("&" if "?" in metadata.authorization_endpoint else "?")
        + query
    )


def code_from_query(query: str, state: str) -> str:
    """The code in an authorization response (RFC 6749 section 4.1.2).

    Raises InvalidResponse, and for an error response (4.1.2.1) AccessDenied or another OAuthError.
    """
    return _code_in(_fields_of(query), state)


def _fields_of(query: str) -> dict[str, str]:
    try:
        pairs = urllib.parse.parse_qsl(query, max_num_fields=20)
    except ValueError:
        raise InvalidResponse("it has too many parameters") from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise InvalidResponse("it repeats a parameter")
    return fields


def _code_in(fields: Mapping[str, str], state: str) -> str:
    if not hmac.compare_digest(fields.get("state", "").encode(), state.encode()):
        raise InvalidResponse("it belongs to another attempt to sign in (its state differs)")
    if "error" in fields:
        raise _error_response(fields)
    if not re.fullmatch(r"[!-~]{1,4096}", fields.get("code", "")):
        raise InvalidResponse("it has no 'code' parameter")
    return fields["code"]


def code_from_paste(text: str, state: str) -> str | None:
    """The code in pasted text: the URL of the redirect, its query, or the bare code; None if empty.

    Raises as `code_from_query`, and Incomplete if a URL or query ends within its state. Only PKCE
    binds a bare code to the attempt.
    """
    text = text.strip().strip("\"'")
    if not text:
        return None
    if URL_OR_QUERY.search(text):
        is_url = "?" in text or "://" in text
        fields = _fields_of(text.partition("?")[2].partition("#")[0] if is_url else text)
        given = fields.get("state", "")
        if "error" not in fields and given != state and state.startswith(given):
            raise Incomplete("it ends before its state")
        # In an error response, xAI leaves the state out at times. The user pasted it on purpose.
        if "error" in fields and "state" not in fields:
            raise _error_response(fields)
        return _code_in(fields, state)
    if not re.fullmatch(r"[!-%'-~]{1,4096}", text):
        raise InvalidResponse("it is neither a URL nor a code")
    if len(text) < MIN_CODE_LENGTH:
        raise InvalidResponse("it is too short for a code")
    return text


def exchange(
    session: Session,
    metadata: discovery.Metadata,
    settings: config.Config,
    attempt: Attempt,
    code: str,
    *,
    sleep: Callable[[float], Any] = time.sleep,
) -> tokens.Login:
    """Exchange the code for tokens (section 4.1.3).

    Raises GrantRefused, ForeignLogin, ClientRejected, NotEntitled, and IssuerUnavailable after
    several tries.
    """

    def check_nonce(claims: Mapping[str, Any]) -> None:
        """OpenID Connect Core section 3.1.3.7."""
        if claims.get("nonce") != attempt.nonce:
            raise errors.ForeignLogin(
                "invalid_nonce",
                "",
                f"{metadata.issuer} returned the login of another attempt (its nonce differs), "
                f"which was not saved; {errors.SIGN_IN}",
            )

    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": attempt.redirect_uri,
        "client_id": settings.client_id,
        "code_verifier": attempt.verifier,
    }
    for tries_left in reversed(range(TRIES)):
        try:
            return token_endpoint.request(
                session,
                metadata.token_endpoint,
                form,
                issuer=metadata.issuer,
                scope=settings.scope,
                check_id_token=check_nonce,
            )
        except errors.IssuerUnavailable:
            if not tries_left:
                raise
            sleep(PAUSE)
    raise AssertionError("not reached")


def _error_response(fields: Mapping[str, str]) -> errors.OAuthError:
    code = token_endpoint.shown(fields["error"])
    description = token_endpoint.shown(fields.get("error_description"))
    reason = token_endpoint.detail(code, description)
    if code == "access_denied":
        message = f"the login was denied ({reason}); start again to approve it"
        return errors.AccessDenied(code, description, message)
    if code == "invalid_scope":
        return token_endpoint.InvalidScope(code, description)
    message = f"the issuer ended the login ({reason}); start again"
    return errors.OAuthError(code, description, message)
