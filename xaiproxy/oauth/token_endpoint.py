"""RFC 6749 sections 5 and 6: the token endpoint, whatever the grant, and what its answers mean."""

import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from xaiproxy import errors, log, tokens
from xaiproxy.oauth.session import Answer, Session

# Beside RFC 6749's invalid_grant, codes that other servers are known to say for a dead grant.
DEAD_GRANT = frozenset(("invalid_grant", "refresh_token_reused", "revoked_token", "invalid_token",
                        "unauthorized_client"))
TEXT_LIMIT = 200  # characters of an outsider's text in our messages
LONG_WORD = re.compile(r"[\w~+/=-]{32,}")  # no word that a person needs, but maybe a token


def refresh(session: Session, endpoint: str, login: tokens.Tokens, *, deadline: float = 30.0,
            now: Callable[[], float] = time.time) -> tokens.Tokens:
    """Spend the refresh token (RFC 6749 section 6). The caller holds the lock and has checked the endpoint.

    Raises GrantRefused, ClientRejected, NotEntitled or IssuerUnavailable, whose `sent` says whether the
    refresh token may be spent and its successor lost.
    """
    form = {"grant_type": "refresh_token", "refresh_token": login.refresh_token, "client_id": login.client_id}
    return request(session, endpoint, form, issuer=login.issuer, former=login, deadline=deadline, now=now)


def request(session: Session, endpoint: str, form: "Mapping[str, str]", *, issuer: str,
            scope: "str | None" = None, former: "tokens.Tokens | None" = None,
            kinds: "Mapping[str, type[errors.OAuthError]] | None" = None,
            check_id_token: "Callable[[dict[str, Any]], None]" = lambda claims: None,
            deadline: float = 30.0, now: Callable[[], float] = time.time) -> tokens.Tokens:
    """Post a grant and return the Tokens that it gives (sections 5.1, 5.2). Raises as `refresh` does.

    scope: what was asked for, which an answer without scope grants. former: what is refreshed. kinds: further
    exceptions to raise, by `error` code. check_id_token: called with the id_token's claims, if one came.
    """
    sent_at = now()  # not when the answer came: the lifetime runs from the issue, which lies between the two
    answer = session.post(endpoint, form, deadline)
    host = urllib.parse.urlsplit(endpoint).netloc
    if answer.is_html or not 200 <= answer.status < 300:
        raise refusal(answer, host, form, kinds or {})
    body = answer.json()
    try:
        if body is None:
            raise ValueError("is no JSON object")
        login = tokens.from_response(body, now=sent_at, issuer=issuer, client_id=form["client_id"],
                                     token_endpoint=endpoint, scope=scope, former=former)
    except ValueError as error:
        raise errors.IssuerUnavailable(f"{host} answered {answer.summary}, but its body {error}",
                                       sent=True) from None
    if isinstance(body.get("id_token"), str):
        check_id_token(tokens.jwt_claims(body["id_token"]))
    return login


def refusal(answer: Answer, host: str, form: "Mapping[str, str]",
            kinds: "Mapping[str, type[errors.OAuthError]] | None" = None) -> errors.Error:
    """What an answer means that is no success: definite, so that nothing was spent (`sent` is False)."""
    body = None if answer.is_html else answer.json()
    code = shown(body.get("error"), form) if body else ""
    description = shown(body.get("error_description"), form) if body else ""
    said = f"{code}: {description}" if description else code
    if answer.status < 500:
        if kinds and code in kinds:
            error = kinds[code](code, description, f"{host} ended the login ({said}); start again")
            if isinstance(error, errors.SlowDown):
                error.interval = body.get("interval")
            return error
        if answer.status == 403 and body:
            return errors.NotEntitled(code or "forbidden", description,
                                      f"{host} refuses this account ({said or 'HTTP 403'}); the login itself "
                                      "is good: see https://grok.com for what its subscription allows")
        if code in DEAD_GRANT and answer.status != 429:
            noun = "login" if "refresh_token" in form else "code"
            return errors.GrantRefused(code, description, f"{host} does not take this {noun} any more "
                                       f"({said}); {errors.SIGN_IN}")
        if code == "invalid_client":
            return errors.ClientRejected(code, description, f"{host} does not know our client ({said}); "
                                         "check XAI_PROXY_CLIENT_ID, or try again later")
    if answer.status in (415, 422):
        said = "it did not understand our request; report that as a fault of xaiproxy"
    elif answer.is_html:
        said = "a page instead of an answer, such as a firewall or an endpoint that moved gives"
    return errors.IssuerUnavailable(f"{host} answered {answer.summary}" + (f": {said}" if said else ""),
                                    retry_after=answer.retry_after)


def shown(text: object, form: "Mapping[str, str] | None" = None) -> str:
    """An outsider's text for our messages: printable, short, and without what is or could be a token."""
    if not isinstance(text, str):
        return ""
    for name, value in (form or {}).items():
        if name in ("refresh_token", "device_code", "code", "code_verifier", "token") and value:
            text = text.replace(value, "[secret]")
    text = "".join(character if character.isprintable() else " " for character in text[:4 * TEXT_LIMIT])
    text = LONG_WORD.sub("[secret]", log.SECRETS.sub("[secret]", text))
    return " ".join(text.split())[:TEXT_LIMIT]
