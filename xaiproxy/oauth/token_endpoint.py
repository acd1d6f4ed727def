"""RFC 6749 sections 5 and 6: the token endpoint for every grant, and what its responses mean."""

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xaiproxy import errors, log, tokens
from xaiproxy.oauth.session import Answer, Session

# Codes that servers are known to use for a dead grant, in lower case. Only the first is RFC 6749's.
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
# RFC 6749 sections 4.1.2.1 and 5.2, RFC 8628 section 3.5. In a 5xx another code may be a gateway's.
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
TRANSIENT = frozenset(("server_error", "temporarily_unavailable"))
# Cloudflare's statuses for a request that did not reach its origin.
NOT_FORWARDED = frozenset((521, 523, 525, 526))
WORD = re.compile(r"[a-z][a-z0-9_.:-]*")
TEXT_LIMIT = 200  # characters of a server's text in our messages
# Possibly a token, and too long to be a word.
LONG_WORD = re.compile(r"[\w~+/=-]{32,}")


def refresh(
    session: Session,
    endpoint: str,
    login: tokens.Tokens,
    *,
    deadline: float = 30.0,
    now: Callable[[], float] = time.time,
) -> tokens.Tokens:
    """Spend the refresh token of `login`, which has one (RFC 6749 section 6).

    The caller holds the lock and has checked the endpoint. Raises GrantRefused, ClientRejected,
    NotEntitled or IssuerUnavailable. Their `sent`: whether the refresh token may be spent and its
    successor lost.
    """
    form = {
        "grant_type": "refresh_token",
        "refresh_token": login.refresh_token or "",
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
    """Post a grant and return the tokens of the response (sections 5.1, 5.2). Raises as `refresh`.

    `scope`: requested scope, which a response without scope grants.
    `former`: login that is refreshed.
    `kinds`: further exceptions to raise, by `error` code.
    `check_id_token`: called with the claims of the id_token, if there is one.
    """
    # The lifetime begins when the token is issued, which is after this and before the response.
    sent_at = now()
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
    """The error for a response without tokens. Its `sent`: whether the grant may be spent."""
    body = answer.json() or {}
    words = [shown(word, form) for word in _words(body)]
    code = next(filter(WORD.fullmatch, words), "") or next(iter(words), "")
    description = shown(body.get("error_description"), form) or next(
        (word for word in words if word != code), ""
    )
    detail = f"{code}: {description}" if description else code
    if answer.status < 500:
        error = _oauth_error(answer, host, form, kinds or {}, code, description, detail, words)
        if error is not None:
            error.sent = answer.is_success
            return error
    if answer.status in (415, 422):
        detail = "it could not parse the request; please report this as a bug of xaiproxy"
    elif answer.is_html:
        detail = "an HTML page, as from a firewall or from an endpoint that has moved"
    elif answer.is_success:
        detail = detail or "its body is not a JSON object"
    return errors.IssuerUnavailable(
        f"{host} answered {answer.summary}" + (f": {detail}" if detail else ""),
        sent=_may_be_spent(answer, body),
        retry_after=answer.retry_after,
        refused=answer.status in (400, 401) and not answer.is_html and code not in TRANSIENT,
        page=answer.is_html,
    )


def _oauth_error(
    answer: Answer,
    host: str,
    form: Mapping[str, str],
    kinds: Mapping[str, type[errors.OAuthError]],
    code: str,
    description: str,
    detail: str,
    words: list[str],
) -> errors.OAuthError | None:
    """The error for a status below 500, or None if no error code in its body is known."""
    body = answer.json() or {}
    if code in kinds:
        error = kinds[code](code, description, f"{host} ended the login ({detail}); start again")
        if isinstance(error, errors.SlowDown):
            error.interval = body.get("interval")
        return error
    if (answer.status in (400, 401, 403) or answer.is_success) and not DEAD_GRANT.isdisjoint(
        map(str.lower, words)
    ):
        noun = "login" if "refresh_token" in form else "code"
        refused = errors.GrantRefused(
            code,
            description,
            f"{host} no longer accepts this {noun} ({detail}); {errors.SIGN_IN}",
        )
        refused.certain = answer.status in (400, 401) and body.get("error") == "invalid_grant"
        return refused
    if answer.status == 403 and WORD.fullmatch(code):
        return errors.NotEntitled(
            code,
            description,
            f"{host} refuses this account ({detail}); the login itself is valid: "
            "see https://grok.com for what the account's plan includes",
        )
    if code in ("invalid_client", "unauthorized_client"):
        return errors.ClientRejected(
            code,
            description,
            f"{host} rejects the client ID ({detail}); check XAI_PROXY_CLIENT_ID, "
            "or try again later",
        )
    return None


def _has_error(body: Mapping[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, (str, dict)) and error != ""


def _words(body: Mapping[str, Any]) -> Iterator[str]:
    """Possible error codes: where RFC 6749 section 5.2 puts one, and where other servers do."""
    error = body.get("error")
    nested = error if isinstance(error, dict) else {}
    for word in (error, nested.get("code"), nested.get("message"), body.get("code")):
        if isinstance(word, str) and word:
            yield word


def _may_be_spent(answer: Answer, body: Mapping[str, Any]) -> bool:
    """Whether the issuer may have acted on the request.

    A 5xx may be a gateway's, sent after the issuer has acted. Only a 5xx whose body is an error
    response of RFC 6749 section 5.2 is taken for the issuer's own.
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
    """Text of a server for our messages: printable, short, and with possible tokens redacted."""
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
