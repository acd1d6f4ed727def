"""The Tokens value: a login as the token file keeps it and as RFC 6749 section 5.1 answers give it."""

import base64
import dataclasses
import enum
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from xaiproxy import config

DEFAULT_LIFETIME = 3600  # seconds, when neither expires_in nor the JWT's exp tells
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
    "replaces",
)
# Codes of a RefreshError. The refresh token may be spent, and the next try may be hours away:
ANSWER_LOST = "answer_lost"
# No refresh has failed: upstream refuses the access token, and it is too early for another one.
UPSTREAM_REFUSES = "upstream_refuses"


class State(enum.Enum):
    """FRESH: use it. STALE: use it, and renew it. INVALID: it has expired."""

    FRESH = "fresh"
    STALE = "stale"
    INVALID = "invalid"


@dataclasses.dataclass(frozen=True)
class RefreshError:
    """Why the last refresh failed. `at` and `retry_at` (the next try; None: no further one) are unix seconds.

    terminal: only a new login helps.
    failures: refreshes in a row that failed; `alike`: how many of them, up to the last one, had this code.
    token: fingerprint of the refresh token that it is about, or None.
    """

    code: str
    description: str
    at: float
    terminal: bool = False
    retry_at: float | None = None
    failures: int = 0
    alike: int = 0
    token: str | None = None


@dataclasses.dataclass(frozen=True)
class RefreshTry:
    """A refresh token that was sent, or is about to be, and whose successor is not in the file.

    token: its fingerprint. first_at: when it was first sent; `next_at`: when it may be sent again at the earliest; both
    unix seconds. tries: how often it was sent without a definite answer.
    """

    token: str
    first_at: float
    tries: int
    next_at: float


@dataclasses.dataclass(frozen=True)
class Asked:
    """The last refresh was made because upstream had refused the access token.

    next_at: unix seconds before which a refusal causes no other refresh; `wait`: how long that was, in seconds.
    """

    next_at: float
    wait: float


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Times are unix seconds. `extra` holds the file's keys that are not ours: they survive a rewrite."""

    access_token: str = dataclasses.field(repr=False)
    expires_at: float
    refresh_token: str | None = dataclasses.field(default=None, repr=False)
    token_endpoint: str | None = None
    obtained_at: float | None = None
    issuer: str = config.DEFAULT_ISSUER
    client_id: str = config.DEFAULT_CLIENT_ID
    scope: str | None = None
    account: str | None = None
    refresh_error: RefreshError | None = None
    refresh_try: RefreshTry | None = None
    asked: Asked | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def lifetime(self) -> float | None:
        """Seconds from issue to expiry; None when the file does not tell."""
        begin = (
            self.obtained_at
            if self.obtained_at is not None
            else _number(jwt_claims(self.access_token).get("iat"))
        )
        return self.expires_at - begin if begin is not None and begin < self.expires_at else None

    def state(self, now: float, skew: float) -> State:
        """`skew`: seconds before expiry; a fifth of the lifetime if that is more, but never over half of it."""
        left = self.expires_at - now
        if left <= 0:
            return State.INVALID
        lifetime = self.lifetime()
        margin = skew if lifetime is None else min(lifetime / 2, max(skew, lifetime / 5))
        return State.STALE if left < margin else State.FRESH

    def age(self, now: float) -> float:
        """Seconds since the token was issued; infinity when unknown, or when the clock was set back since."""
        begin = (
            self.obtained_at
            if self.obtained_at is not None
            else _number(jwt_claims(self.access_token).get("iat"))
        )
        return now - begin if begin is not None and begin <= now else math.inf

    def to_json(self, replaces: str | None) -> str:
        """The file's text. `replaces`: fingerprint of the refresh token that this login succeeds."""
        known = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "extra"
        }
        for name in ("refresh_error", "refresh_try", "asked"):
            known[name] = known[name] and dataclasses.asdict(known[name])
        values = (
            {name: known.get(name) for name in KEYS} | {"replaces": replaces} | dict(self.extra)
        )
        return json.dumps(values, indent=2) + "\n"


def fingerprint(token: str) -> str:
    """SHA-256 in hex: names a token without telling it."""
    return hashlib.sha256(token.encode()).hexdigest()


def jwt_claims(token: str) -> dict[str, Any]:
    """The claims of a JWT, unverified: for its times and the account's name only. {} when it is no JWT."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def is_refusal(body: bytes) -> bool:
    """Whether the body of a 403 of the API says that the access token is dead; other causes are the account's."""
    text = body.lower()
    return b"unauthenticated:" in text or b"could not be validated" in text


def from_response(
    response: Mapping[str, Any],
    *,
    now: float,
    issuer: str,
    client_id: str,
    token_endpoint: str,
    scope: str | None = None,
    former: Tokens | None = None,
) -> Tokens:
    """Make Tokens of a successful answer (RFC 6749 section 5.1), or raise ValueError if it has no usable access_token.

    Every other member is optional, and is left out when it cannot be used. `former`: the login that was refreshed; what
    the answer leaves out (its refresh_token may) is kept. `now`: unix seconds at which the request was sent.
    """
    access_token = _access_token(response)
    refresh_token = _text(response.get("refresh_token")) or (
        former.refresh_token if former else None
    )
    id_token = response.get("id_token")
    account = jwt_claims(id_token).get("email") if isinstance(id_token, str) else None
    if not (isinstance(account, str) and 0 < len(account) <= 254 and PRINTABLE.fullmatch(account)):
        account = former.account if former else None
    return Tokens(
        access_token=access_token,
        refresh_token=refresh_token,
        expires_at=_expiry(response.get("expires_in"), access_token, now),
        token_endpoint=token_endpoint,
        obtained_at=round(now, 3),
        issuer=issuer,
        client_id=client_id,
        scope=_scope(response.get("scope")) or scope or (former.scope if former else None),
        account=account,
        extra=former.extra if former else {},
    )


def _expiry(expires_in: Any, access_token: str, now: float) -> int:
    """Unix seconds by this machine's clock."""
    if isinstance(expires_in, str) and expires_in.isdecimal():
        expires_in = float(expires_in)
    lifetime = _number(expires_in)
    if (
        not lifetime or _number(now + lifetime) is None
    ):  # a time that from_json would not take is none
        claims = jwt_claims(access_token)
        issued_at, expires_at = _number(claims.get("iat")), _number(claims.get("exp"))
        if expires_at is not None and (issued_at is None or issued_at >= expires_at):
            return int(expires_at)
        # The difference, since the issuer's clock may not be ours.
        lifetime = DEFAULT_LIFETIME if expires_at is None else expires_at - issued_at
    return int(now + lifetime)


def from_json(text: str | bytes) -> Tokens:
    """Parse the file's text, or raise ValueError saying what is wrong with it; never repeats a value.

    A file of the Rust program (access_token, refresh_token, expires_at, token_endpoint) loads as it is, as a
    login of auth.x.ai and the default client.
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
    expires_at = _number(values.get("expires_at"))
    if expires_at is None:
        expires_at = _number(jwt_claims(access_token).get("exp"))
    if expires_at is None:
        raise ValueError("says no expires_at, and its access_token is no JWT with exp")
    # These decide what is sent where: no other can take the place of one that cannot be used.
    refresh_token, issuer, client_id = (
        _needed(values, name) for name in ("refresh_token", "issuer", "client_id")
    )
    mark = fingerprint(refresh_token) if refresh_token else None
    refresh_error = _refresh_error(values.get("refresh_error"), mark)
    refresh_try = _refresh_try(values.get("refresh_try"), mark)
    if (
        refresh_try is None
        and refresh_error is not None
        and refresh_error.code == ANSWER_LOST
        and mark is not None
    ):
        # A file of version 0.1: how often the refresh token was sent is unknown.
        refresh_try = RefreshTry(mark, refresh_error.at, 3, refresh_error.at)
    return Tokens(
        access_token=access_token,
        expires_at=expires_at,
        refresh_token=refresh_token,
        token_endpoint=_text(values.get("token_endpoint")),
        obtained_at=_number(values.get("obtained_at")),
        issuer=issuer or config.DEFAULT_ISSUER,
        client_id=client_id or config.DEFAULT_CLIENT_ID,
        scope=_scope(values.get("scope")),
        account=_text(values.get("account")),
        refresh_error=refresh_error,
        refresh_try=refresh_try,
        asked=_asked(values.get("asked")),
        extra={name: value for name, value in values.items() if name not in KEYS},
    )


def replaces(text: str | bytes) -> str | None:
    """The `replaces` of a file that from_json took."""
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
    """A scope as RFC 6749 section 3.3 writes it; some servers send a list."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = " ".join(value)
    return _text(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return (
        value if 0 <= value < 1e11 else None
    )  # until the year 5138; keeps milliseconds, NaN and infinity out


def _count(value: Any) -> int:
    return (
        value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e9 else 0
    )


def _refresh_error(value: Any, mark: str | None) -> RefreshError | None:
    """None also when it is about another refresh token than the one with the fingerprint `mark`."""
    if not isinstance(value, dict) or value.get("token") not in (None, mark):
        return None
    return RefreshError(
        code=str(value.get("code")),
        description=str(value.get("description")),
        at=_number(value.get("at")) or 0,
        terminal=value.get("terminal") is True,
        retry_at=_number(value.get("retry_at")),
        failures=_count(value.get("failures")),
        alike=_count(value.get("alike")),
        token=value.get("token"),
    )


def _refresh_try(value: Any, mark: str | None) -> RefreshTry | None:
    if not isinstance(value, dict) or mark is None or value.get("token") != mark:
        return None
    return RefreshTry(
        mark,
        first_at=_number(value.get("first_at")) or 0,
        tries=max(1, _count(value.get("tries"))),
        next_at=_number(value.get("next_at")) or 0,
    )


def _asked(value: Any) -> Asked | None:
    next_at, wait = (
        (_number(value.get(name)) for name in ("next_at", "wait"))
        if isinstance(value, dict)
        else (None, None)
    )
    return None if next_at is None or wait is None else Asked(next_at, wait)
