"""A login from and to JSON: the token file's, and RFC 6749 section 5.1's successful response."""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from xaiproxy import config
from xaiproxy.tokens import (
    ANSWER_LOST,
    Asked,
    Login,
    RefreshError,
    RefreshTry,
    fingerprint,
    jwt_claims,
    number,
)

DEFAULT_LIFETIME = 3600  # seconds, if there is neither an expires_in nor a JWT's exp
B64TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1: safe in a header
PRINTABLE = re.compile(r"[ -~]*")
KEYS = (
    "access_token",
    "refresh_token",
    "expires_at",
    "token_endpoint",
    "obtained_at",
    "issuer",
    "client_id",
    "scope",
    "account",
    "refresh_error",
    "refresh_try",
    "asked",
    "salt",
    "replaces",
)

# Members of a published file. All its readers derive the same conversation IDs from the salt.
PUBLISHED = (
    "access_token",
    "expires_at",
    "token_endpoint",
    "obtained_at",
    "issuer",
    "client_id",
    "scope",
    "account",
    "refresh_error",
    "salt",
)


def from_response(
    response: Mapping[str, Any],
    *,
    now: float,
    issuer: str,
    client_id: str,
    token_endpoint: str,
    scope: str | None = None,
    former: Login | None = None,
) -> Login:
    """Return the login in a successful response. Raises ValueError without a usable access_token.

    Every other member is optional, and is left out if it cannot be used.
    `former`: login that was refreshed; members that the response lacks are kept from it.
    `now`: unix seconds at which the request was sent.
    """
    access_token = _access_token(response)
    refresh_token = _text(response.get("refresh_token")) or (
        former.refresh_token if former else None
    )
    id_token = response.get("id_token")
    account = jwt_claims(id_token).get("email") if isinstance(id_token, str) else None
    if not (isinstance(account, str) and 0 < len(account) <= 254 and PRINTABLE.fullmatch(account)):
        account = former.account if former else None
    return Login(
        access_token=access_token,
        refresh_token=refresh_token,
        expires_at=_expiry(response.get("expires_in"), access_token, now),
        token_endpoint=token_endpoint,
        obtained_at=round(now, 3),
        issuer=issuer,
        client_id=client_id,
        scope=_scope(response.get("scope")) or scope or (former.scope if former else None),
        account=account,
        salt=(former.salt if former else None) or secrets.token_hex(16),
        extra=former.extra if former else {},
    )


def _expiry(expires_in: Any, access_token: str, now: float) -> int:
    """Return unix seconds by this machine's clock."""
    if isinstance(expires_in, str) and expires_in.isdecimal():
        expires_in = float(expires_in)
    lifetime = number(expires_in)
    # A time that from_json would reject counts as none.
    if not lifetime or number(now + lifetime) is None:
        claims = jwt_claims(access_token)
        issued_at, expires_at = number(claims.get("iat")), number(claims.get("exp"))
        if expires_at is None:
            lifetime = DEFAULT_LIFETIME
        elif issued_at is None or issued_at >= expires_at:
            return int(expires_at)
        else:
            # The difference, because the issuer's clock may differ from this machine's.
            lifetime = expires_at - issued_at
    return int(now + lifetime)


def from_json(text: str | bytes) -> Login:
    """Return the login in the file's text. Raises ValueError, which never quotes a value.

    A file of the Rust program (access_token, refresh_token, expires_at, token_endpoint) loads as it
    is, as a login of auth.x.ai and the default client.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {_where(error)}") from None
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    access_token = _access_token(values)
    expires_at = number(values.get("expires_at"))
    if expires_at is None:
        expires_at = number(jwt_claims(access_token).get("exp"))
    if expires_at is None:
        raise ValueError("has no expires_at, and its access_token is no JWT with exp")
    # These decide what is sent where, so a default cannot replace one that is unusable.
    refresh_token, issuer, client_id = (
        _needed(values, name) for name in ("refresh_token", "issuer", "client_id")
    )
    mark = fingerprint(refresh_token) if refresh_token else None
    refresh_error = _refresh_error(values.get("refresh_error"), mark)
    refresh_try = _refresh_try(values.get("refresh_try"), mark)
    if refresh_try is None and refresh_error and refresh_error.code == ANSWER_LOST and mark:
        # A file of version 0.1: how often the refresh token was sent is unknown.
        refresh_try = RefreshTry(mark, refresh_error.at, 3, refresh_error.at)
    return Login(
        access_token=access_token,
        expires_at=expires_at,
        refresh_token=refresh_token,
        token_endpoint=_text(values.get("token_endpoint")),
        obtained_at=number(values.get("obtained_at")),
        issuer=issuer or config.DEFAULT_ISSUER,
        client_id=client_id or config.DEFAULT_CLIENT_ID,
        scope=_scope(values.get("scope")),
        account=_text(values.get("account")),
        refresh_error=refresh_error,
        refresh_try=refresh_try,
        asked=_asked(values.get("asked")),
        salt=_text(values.get("salt")),
        extra={name: value for name, value in values.items() if name not in KEYS},
    )


def to_json(login: Login, replaces: str | None) -> str:
    """Return the file's text. `replaces`: fingerprint of the refresh token before this login's."""
    known = dataclasses.asdict(dataclasses.replace(login, extra={})) | {"replaces": replaces}
    return json.dumps({name: known[name] for name in KEYS} | dict(login.extra), indent=2) + "\n"


def access_only(login: Login) -> str:
    """Return the text of a token file that serves requests and holds nothing to refresh with.

    Of a failure it has only that the login has ended: a retry changes nothing for its readers.
    """
    error = login.refresh_error
    ended = dataclasses.replace(error, token=None) if error and error.terminal else None
    known = dataclasses.asdict(dataclasses.replace(login, refresh_error=ended, extra={}))
    return json.dumps({name: known[name] for name in PUBLISHED}, indent=2) + "\n"


def replaces(text: str | bytes) -> object:
    """Return the `replaces` of a file that from_json has accepted."""
    return json.loads(text).get("replaces")


def _where(error: ValueError) -> str:
    # A JSONDecodeError quotes no content in msg; a UnicodeDecodeError would quote bytes.
    return (
        f"{error.msg.removesuffix(' at')} at line {error.lineno}"
        if isinstance(error, json.JSONDecodeError)
        else "it is not UTF-8"
    )


def _access_token(values: Mapping[str, Any]) -> str:
    token = values.get("access_token")
    if not isinstance(token, str) or not B64TOKEN.fullmatch(token):
        raise ValueError("holds no access_token of RFC 6750's characters")
    return token


def _needed(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value not in (None, "") and _text(value) is None:
        raise ValueError(f"holds a {name} that is not printable ASCII")
    return value or None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value and PRINTABLE.fullmatch(value) else None


def _scope(value: Any) -> str | None:
    """Return a scope in RFC 6749 section 3.3's form; some servers send a list."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = " ".join(value)
    return _text(value)


def _count(value: Any) -> int:
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e9
    return value if valid else 0


def _refresh_error(value: Any, mark: str | None) -> RefreshError | None:
    """`mark`: fingerprint of the login's refresh token; another token's error counts as none."""
    if not isinstance(value, dict) or value.get("token") not in (None, mark):
        return None
    return RefreshError(
        code=str(value.get("code")),
        description=str(value.get("description")),
        at=number(value.get("at")) or 0,
        terminal=value.get("terminal") is True,
        retry_at=number(value.get("retry_at")),
        failures=_count(value.get("failures")),
        alike=_count(value.get("alike")),
        token=value.get("token"),
    )


def _refresh_try(value: Any, mark: str | None) -> RefreshTry | None:
    if not isinstance(value, dict) or mark is None or value.get("token") != mark:
        return None
    return RefreshTry(
        mark,
        first_at=number(value.get("first_at")) or 0,
        tries=max(1, _count(value.get("tries"))),
        next_at=number(value.get("next_at")) or 0,
    )


def _asked(value: Any) -> Asked | None:
    if not isinstance(value, dict):
        return None
    next_at, wait = number(value.get("next_at")), number(value.get("wait"))
    return None if next_at is None or wait is None else Asked(next_at, wait)
