"""RFC 6749 sections 5 and 6: the token endpoint, whatever the grant, and what its answers mean."""

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xaiproxy import errors, log, tokens
from xaiproxy.oauth.session import Answer, Session

# Words by which servers are known to call a grant dead, in lower case. Only the first is RFC 6749's.
DEAD_GRANT = frozenset(
    (
        "invalid_grant",
        "refresh_token_reused",
        "refresh_token_expired",
        "bad_refresh_token",
        "token_expired",
        "token_revoked",
    )
)
# RFC 6749 sections 4.1.2.1 and 5.2, RFC 8628 section 3.5: in a 5xx any other word may be a gateway's.
ERROR_CODES = frozenset(
    (
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
        "server_error",
        "temporarily_unavailable",
        "slow_down",
    )
)
PASSING = frozenset(("server_error", "temporarily_unavailable"))
# Cloudflare's statuses for a request that did not get to its origin.
NOT_FORWARDED = frozenset((521, 523, 525, 526))
WORD = re.compile(r"[a-z][a-z0-9_.:-]*")
TEXT_LIMIT = 200  # characters of an outsider's text in our messages
LONG_WORD = re.compile(r"[\w~+/=-]{32,}")  # no word that a person needs, but maybe a token


def refresh(
    session: Session,
    endpoint: str,
    login: tokens.Tokens,
    *,
    deadline: float = 30.0,
    now: Callable[[], float] = time.time,
) -> tokens.Tokens:
    """Spend the refresh token (RFC 6749 section 6). The caller holds the lock and has checked the endpoint.

    Raises GrantRefused, ClientRejected, NotEntitled or IssuerUnavailable, whose `sent` says whether the
    refresh token may be spent and its successor lost.
    """
    form = {
        "grant_type": "refresh_token",
        "refresh_token": login.refresh_token,
        "client_id": login.client_id,
    }
    return request(
        session, endpoint, form, issuer=login.issuer, former=login, deadline=deadline, now=now
    )


def request(
    session: Session,
    endpoint: str,
    form: Mapping[str, str],
    *,
    issuer: str,
    scope: str | None = None,
    former: tokens.Tokens | None = None,
    kinds: Mapping[str, type[errors.OAuthError]] | None = None,
    check_id_token: Callable[[dict[str, Any]], None] = lambda claims: None,
    deadline: float = 30.0,
    now: Callable[[], float] = time.time,
) -> tokens.Tokens:
    """Post a grant and return the Tokens that it gives (sections 5.1, 5.2). Raises as `refresh` does.

    scope: what was asked for, which an answer without scope grants. former: what is refreshed. kinds: further
    exceptions to raise, by `error` code. check_id_token: called with the id_token's claims, if one came.
    """
    sent_at = (
        now()
    )  # not when the answer came: the lifetime runs from the issue, which lies between the two
    answer = session.post(endpoint, form, deadline)
    host = urllib.parse.urlsplit(endpoint).netloc
    body = answer.json()
    if body is None or not answer.is_success or _has_error(body):
        raise refusal(answer, host, form, kinds or {})
    try:
        login = tokens.from_response(
            body,
            now=sent_at,
            issuer=issuer,
            client_id=form["client_id"],
            token_endpoint=endpoint,
            scope=scope,
            former=former,
        )
    except ValueError as error:
        raise errors.IssuerUnavailable(
            f"{host} answered {answer.summary}, but its body {error}", sent=True
        ) from None
    if isinstance(body.get("id_token"), str):
        check_id_token(tokens.jwt_claims(body["id_token"]))
    return login


def refusal(
    answer: Answer,
    host: str,
    form: Mapping[str, str],
    kinds: Mapping[str, type[errors.OAuthError]] | None = None,
) -> errors.Error:
    """The error that an answer without tokens stands for. Its `sent` says whether the grant may be spent all the same."""
    body = answer.json() or {}
    words = [shown(word, form) for word in _words(body)]
    code = next(filter(WORD.fullmatch, words), "") or next(iter(words), "")
    description = shown(body.get("error_description"), form) or next(
        (word for word in words if word != code), ""
    )
    said = f"{code}: {description}" if description else code
    if answer.status < 500:
        error = _oauth_error(answer, host, form, kinds or {}, code, description, said, words)
        if error is not None:
            error.sent = answer.is_success
            return error
    if answer.status in (415, 422):
        said = "it did not understand our request; report that as a fault of xaiproxy"
    elif answer.is_html:
        said = "a page instead of an answer, such as a firewall or an endpoint that moved gives"
    elif answer.is_success:
        said = said or "its body is no JSON object"
    return errors.IssuerUnavailable(
        f"{host} answered {answer.summary}" + (f": {said}" if said else ""),
        sent=_may_be_spent(answer, body),
        retry_after=answer.retry_after,
        refused=answer.status in (400, 401) and not answer.is_html and code not in PASSING,
        page=answer.is_html,
    )


def _oauth_error(
    answer: Answer,
    host: str,
    form: Mapping[str, str],
    kinds: Mapping[str, type[errors.OAuthError]],
    code: str,
    description: str,
    said: str,
    words: list[str],
) -> errors.OAuthError | None:
    """The error that a status below 500 stands for; None when no error code of its body is known."""
    if code in kinds:
        error = kinds[code](code, description, f"{host} ended the login ({said}); start again")
        if isinstance(error, errors.SlowDown):
            error.interval = answer.json().get("interval")
        return error
    if (answer.status in (400, 401, 403) or answer.is_success) and not DEAD_GRANT.isdisjoint(
        map(str.lower, words)
    ):
        noun = "login" if "refresh_token" in form else "code"
        refused = errors.GrantRefused(
            code,
            description,
            f"{host} does not take this {noun} any more ({said}); {errors.SIGN_IN}",
        )
        refused.certain = (
            answer.status in (400, 401) and answer.json().get("error") == "invalid_grant"
        )
        return refused
    if answer.status == 403 and WORD.fullmatch(code):
        return errors.NotEntitled(
            code,
            description,
            f"{host} refuses this account ({said}); the login itself "
            "is good: see https://grok.com for what its subscription allows",
        )
    if code in ("invalid_client", "unauthorized_client"):
        return errors.ClientRejected(
            code,
            description,
            f"{host} rejects our client ({said}); check XAI_PROXY_CLIENT_ID, or try again later",
        )
    return None


def _has_error(body: Mapping[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, (str, dict)) and error != ""


def _words(body: Mapping[str, Any]) -> Iterator[str]:
    """What may be an error code: where RFC 6749 section 5.2 puts it, and where other servers do."""
    error = body.get("error")
    nested = error if isinstance(error, dict) else {}
    for word in (error, nested.get("code"), nested.get("message"), body.get("code")):
        if isinstance(word, str) and word:
            yield word


def _may_be_spent(answer: Answer, body: Mapping[str, Any]) -> bool:
    """Whether the issuer may have acted on a request with this answer: a gateway's 5xx says nothing of that.

    Of the bodies of a 5xx only one as RFC 6749 section 5.2 has it is the issuer's own.
    """
    if answer.is_success:
        return True
    error = body.get("error")
    return answer.status >= 500 and not (
        (isinstance(error, str) and error in ERROR_CODES)
        or answer.status in NOT_FORWARDED
        or (answer.status == 503 and answer.retry_after is not None)
    )


def shown(text: object, form: Mapping[str, str] | None = None) -> str:
    """An outsider's text for our messages: printable, short, and without what is or could be a token."""
    if not isinstance(text, str):
        return ""
    for name, value in (form or {}).items():
        if name in ("refresh_token", "device_code", "code", "code_verifier", "token") and value:
            text = text.replace(value, "[secret]")
    text = "".join(
        character if character.isprintable() else " " for character in text[: 4 * TEXT_LIMIT]
    )
    text = LONG_WORD.sub("[secret]", log.SECRETS.sub("[secret]", text))
    return " ".join(text.split())[:TEXT_LIMIT]
