"""RFC 6749 section 4.1 with PKCE (RFC 7636) and a loopback redirect (RFC 8252 section 7.3).

    with loopback.Listener(settings.redirect_port, issuer) as listener:
        attempt = Attempt.begin(listener.redirect_uri)
        show authorization_url(metadata, settings, attempt)
        code = listener.wait(attempt.state, ...)       blocks
        login = exchange(session, metadata, settings, attempt, code)

After GrantRefused wait again: the page can give another code.
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

from xaiproxy import config, errors, tokens
from xaiproxy.oauth import discovery, token_endpoint
from xaiproxy.oauth.session import Session

TRIES = 3  # for the exchange: the person's approval hangs on it
PAUSE = 2.0  # seconds between two of them
SHORTEST_CODE = (
    8  # characters that a pasted code has at least; what is typed by mistake is mostly shorter
)
# A URL, or a query of one; a code may end in =, as base64 does.
ADDRESS = re.compile(r"://|^\?|(^|\?)[a-z_]+=[^=&]")


class NotTheAnswer(ValueError):
    """What came is not the issuer's answer to this attempt: says why; the right one may still come."""


class Incomplete(NotTheAnswer):
    """The beginning of the answer: what comes next may complete it."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One try to sign in. `state` ties the redirect to it, `nonce` the id_token, `verifier` the code."""

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
    """The page on which the person approves."""
    if metadata.authorization_endpoint is None:
        raise errors.IssuerUnavailable(
            f"{metadata.issuer} offers no browser login; use " + errors.typed("xai-login --device")
        )
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
            # plan: without it xAI's consent page used to refuse loopback redirects. referrer: who is asking.
            "plan": "generic",
            "referrer": "xaiproxy",
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

    Raises NotTheAnswer, and AccessDenied or another OAuthError when it is an error response (4.1.2.1).
    """
    return _code_in(_fields_of(query), state)


def _fields_of(query: str) -> dict[str, str]:
    try:
        pairs = urllib.parse.parse_qsl(query, max_num_fields=20)
    except ValueError:
        raise NotTheAnswer("it has too many parameters") from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise NotTheAnswer("it repeats a parameter")
    return fields


def _code_in(fields: Mapping[str, str], state: str) -> str:
    if not hmac.compare_digest(fields.get("state", "").encode(), state.encode()):
        raise NotTheAnswer("it belongs to another attempt to sign in (its state is not ours)")
    if "error" in fields:
        raise _error_response(fields)
    if not re.fullmatch(r"[!-~]{1,4096}", fields.get("code", "")):
        raise NotTheAnswer("it has no 'code' parameter")
    return fields["code"]


def code_from_paste(text: str, state: str) -> str | None:
    """The code in what a person pasted: the redirect's URL, its query, or the bare code; None if nothing.

    Raises as `code_from_query`, and Incomplete if a URL or query ends before its state does. PKCE alone ties a bare
    code to the attempt.
    """
    text = text.strip().strip("\"'")
    if not text:
        return None
    if ADDRESS.search(text):
        fields = _fields_of(
            text.partition("?")[2].partition("#")[0] if "?" in text or "://" in text else text
        )
        if (
            "error" in fields and "state" not in fields
        ):  # xAI leaves it out at times, and a person pasted this
            raise _error_response(fields)
        if (
            "error" not in fields
            and (given := fields.get("state", "")) != state
            and state.startswith(given)
        ):
            raise Incomplete("it ends before its state")
        return _code_in(fields, state)
    if not re.fullmatch(r"[!-%'-~]{1,4096}", text):
        raise NotTheAnswer("it is neither a URL nor a code")
    if len(text) < SHORTEST_CODE:
        raise NotTheAnswer("it is too short for a code")
    return text


def exchange(
    session: Session,
    metadata: discovery.Metadata,
    settings: config.Config,
    attempt: Attempt,
    code: str,
    *,
    sleep: Callable[[float], Any] = time.sleep,
) -> tokens.Tokens:
    """Trade the code for tokens (section 4.1.3).

    Raises GrantRefused, ForeignLogin, ClientRejected, NotEntitled, and IssuerUnavailable after several tries.
    """

    def check_nonce(claims: Mapping[str, Any]) -> None:  # OpenID Connect Core 3.1.3.7
        if claims.get("nonce") != attempt.nonce:
            raise errors.ForeignLogin(
                "invalid_nonce",
                "",
                f"{metadata.issuer} answered with a login that "
                "somebody else began (its nonce is not ours), which was not saved; "
                f"{errors.SIGN_IN}",
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
    said = f"{code}: {description}" if description else code
    if code == "access_denied":
        return errors.AccessDenied(
            code, description, f"the login was denied ({said}); start again to approve it"
        )
    return errors.OAuthError(code, description, f"the issuer ended the login ({said}); start again")
