"""RFC 6749 sections 5 and 6: the token endpoint for every grant, and what its responses mean."""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from xaiproxy import errors, log, provider, token_json, tokens
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
CODE = re.compile(r"[a-z][a-z0-9_.:-]*")
TEXT_LIMIT = 200  # characters of a server's text in our messages
# Possibly a token, and too long to be a word.
LONG_WORD = re.compile(r"[\w~+/=-]{32,}")


class InvalidScope(errors.OAuthError):
    """RFC 6749 sections 4.1.2.1 and 5.2."""

    exit_code = errors.EXIT_CONFIGURATION

    def __init__(self, error: str, description: str, message: str = ""):
        super().__init__(
            error,
            description,
            f"the issuer refuses the scope ({detail(error, description)}); correct XAI_PROXY_SCOPE",
        )


def refresh(
    session: Session,
    endpoint: str,
    login: tokens.Login,
    *,
    deadline: float = 30.0,
    now: Callable[[], float] = time.time,
) -> tokens.Login:
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
    former: tokens.Login | None = None,
    kinds: Mapping[str, type[errors.OAuthError]] | None = None,
    check_id_token: Callable[[dict[str, Any]], None] = lambda claims: None,
    deadline: float = 30.0,
    now: Callable[[], float] = time.time,
) -> tokens.Login:
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
        login = token_json.from_response(
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


class _ErrorResponse(NamedTuple):
    """The error in a response, redacted. `codes`: all texts that may be an error code."""

    code: str
    description: str
    codes: list[str]

    @classmethod
    def of(cls, answer: Answer, form: Mapping[str, str]) -> _ErrorResponse:
        body = answer.json() or {}
        codes = [shown(code, form) for code in _codes(body)]
        code = next(filter(CODE.fullmatch, codes), "") or next(iter(codes), "")
        others = (other for other in codes if other != code)
        return cls(code, shown(body.get("error_description"), form) or next(others, ""), codes)


def refusal(
    answer: Answer,
    host: str,
    form: Mapping[str, str],
    kinds: Mapping[str, type[errors.OAuthError]] | None = None,
) -> errors.Error:
    """The error for a response without tokens. Its `sent`: whether the grant may be spent."""
    found = _ErrorResponse.of(answer, form)
    if answer.status < 500:
        noun = "login" if "refresh_token" in form else "code"
        error = _oauth_error(answer, found, host, noun, form, kinds or {})
        if error is not None:
            error.sent = answer.is_success
            return error
    reason = detail(found.code, found.description)
    if answer.status in (415, 422):
        reason = "it could not parse the request; please report this as a bug of xaiproxy"
    elif answer.is_html:
        reason = "an HTML page, as from a firewall or from an endpoint that has moved"
    elif answer.is_success:
        reason = reason or "its body is not a JSON object"
    return errors.IssuerUnavailable(
        f"{host} answered {answer.summary}" + (f": {reason}" if reason else ""),
        sent=_may_be_spent(answer),
        retry_after=answer.retry_after,
        refused=answer.status in (400, 401) and not answer.is_html and found.code not in TRANSIENT,
        page=answer.is_html,
    )


def _oauth_error(
    answer: Answer,
    found: _ErrorResponse,
    host: str,
    noun: str,
    form: Mapping[str, str],
    kinds: Mapping[str, type[errors.OAuthError]],
) -> errors.OAuthError | None:
    """The error for a status below 500, or None if no error code in its body is known."""
    body, code, description = answer.json() or {}, found.code, found.description
    reason = detail(code, description)
    if code in kinds:
        error = kinds[code](code, description, f"{host} ended the login ({reason}); start again")
        if isinstance(error, errors.SlowDown):
            error.interval = body.get("interval")
        return error
    is_dead = not DEAD_GRANT.isdisjoint(map(str.lower, found.codes))
    if is_dead and (answer.status in (400, 401, 403) or answer.is_success):
        message = f"{host} no longer accepts this {noun} ({reason}); {errors.SIGN_IN}"
        refused = errors.GrantRefused(code, description, message)
        refused.certain = answer.status in (400, 401) and body.get("error") == "invalid_grant"
        return refused
    if answer.status == 403 and CODE.fullmatch(code):
        of_xai = provider.is_xai(form.get("client_id", ""))
        place = "https://grok.com" if of_xai else provider.ITS_PAGES
        return errors.NotEntitled(
            code,
            description,
            f"{host} refuses this account ({reason}); the login itself is valid: "
            f"see {place} for what the account's plan includes",
        )
    if code in ("invalid_client", "unauthorized_client"):
        return errors.ClientRejected(
            code,
            description,
            f"{host} rejects the client ID ({reason}); check XAI_PROXY_CLIENT_ID, "
            "or try again later",
        )
    return None


def detail(code: str, description: str) -> str:
    """The code, and the description if there is one, for parentheses in a message."""
    return f"{code}: {description}" if description else code


def _has_error(body: Mapping[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, (str, dict)) and error != ""


def _codes(body: Mapping[str, Any]) -> Iterator[str]:
    """Possible error codes: where RFC 6749 section 5.2 puts one, and where other servers do."""
    error = body.get("error")
    nested = error if isinstance(error, dict) else {}
    for code in (error, nested.get("code"), nested.get("message"), body.get("code")):
        if isinstance(code, str) and code:
            yield code


def _may_be_spent(answer: Answer) -> bool:
    """Whether the issuer may have acted on the request.

    A 5xx may be a gateway's, sent after the issuer has acted. Only a 5xx whose body is an error
    response of RFC 6749 section 5.2 is taken for the issuer's own.
    """
    if answer.is_success:
        return True
    error = (answer.json() or {}).get("error")
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
