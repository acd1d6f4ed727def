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
KEYS = ("access_token", "refresh_token", "expires_at", "token_endpoint", "obtained_at", "issuer", "client_id",
        "scope", "account", "refresh_error", "replaces")


class State(enum.Enum):
    """FRESH: use it. STALE: use it, and renew it. INVALID: it has expired."""

    FRESH = "fresh"
    STALE = "stale"
    INVALID = "invalid"


@dataclasses.dataclass(frozen=True)
class RefreshError:
    """Why the last refresh failed. `at` and `retry_at` (the next try; None: no further one) are unix seconds.

    terminal: only a new login helps.
    """

    code: str
    description: str
    at: float
    terminal: bool = False
    retry_at: "float | None" = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Times are unix seconds. `extra` holds the file's keys that are not ours: they survive a rewrite."""

    access_token: str = dataclasses.field(repr=False)
    expires_at: float
    refresh_token: "str | None" = dataclasses.field(default=None, repr=False)
    token_endpoint: "str | None" = None
    obtained_at: "float | None" = None
    issuer: str = config.DEFAULT_ISSUER
    client_id: str = config.DEFAULT_CLIENT_ID
    scope: "str | None" = None
    account: "str | None" = None
    refresh_error: "RefreshError | None" = None
    extra: "Mapping[str, Any]" = dataclasses.field(default_factory=dict, repr=False)

    def lifetime(self) -> "float | None":
        """Seconds from issue to expiry; None when the file does not tell."""
        begin = self.obtained_at if self.obtained_at is not None else _number(jwt_claims(self.access_token).get("iat"))
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
        begin = self.obtained_at if self.obtained_at is not None else _number(jwt_claims(self.access_token).get("iat"))
        return now - begin if begin is not None and begin <= now else math.inf

    def to_json(self, replaces: "str | None") -> str:
        """The file's text. `replaces`: fingerprint of the refresh token that this login succeeds."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "extra"}
        if self.refresh_error is not None:
            known["refresh_error"] = dataclasses.asdict(self.refresh_error)
        values = {name: known.get(name) for name in KEYS} | {"replaces": replaces} | dict(self.extra)
        return json.dumps(values, indent=2) + "\n"


def fingerprint(token: str) -> str:
    """SHA-256 in hex: names a token without telling it."""
    return hashlib.sha256(token.encode()).hexdigest()


def jwt_claims(token: str) -> "dict[str, Any]":
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


def from_response(response: "Mapping[str, Any]", *, now: float, issuer: str, client_id: str, token_endpoint: str,
                  scope: "str | None" = None, former: "Tokens | None" = None) -> Tokens:
    """Make Tokens of a successful answer (RFC 6749 section 5.1), or raise ValueError saying what is wrong with it.

    `former`: the login that was refreshed; what the answer leaves out (its refresh_token may) is kept.
    """
    access_token = _access_token(response)
    refresh_token = _text(response, "refresh_token") or (former.refresh_token if former else None)
    id_claims = jwt_claims(_text(response, "id_token") or "")
    expires_in = response.get("expires_in")
    if isinstance(expires_in, str) and expires_in.isdecimal():
        expires_in = float(expires_in)
    expires_in = _number(expires_in)
    expires_at = _number(now + expires_in) if expires_in else None  # a time that from_json would not take is none
    if expires_at is None:
        expires_at = _number(jwt_claims(access_token).get("exp"))
    account = id_claims.get("email")
    if not (isinstance(account, str) and 0 < len(account) <= 254 and PRINTABLE.fullmatch(account)):
        account = former.account if former else None
    return Tokens(
        access_token=access_token, refresh_token=refresh_token,
        expires_at=int(expires_at if expires_at is not None else now + DEFAULT_LIFETIME),
        token_endpoint=token_endpoint, obtained_at=round(now, 3), issuer=issuer, client_id=client_id,
        scope=_text(response, "scope") or scope or (former.scope if former else None), account=account,
        extra=former.extra if former else {})


def from_json(text: "str | bytes") -> Tokens:
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
    return Tokens(
        access_token=access_token, expires_at=expires_at, refresh_token=_text(values, "refresh_token"),
        token_endpoint=_text(values, "token_endpoint"), obtained_at=_number(values.get("obtained_at")),
        issuer=_text(values, "issuer") or config.DEFAULT_ISSUER,
        client_id=_text(values, "client_id") or config.DEFAULT_CLIENT_ID,
        scope=_text(values, "scope"), account=_text(values, "account"),
        refresh_error=_refresh_error(values.get("refresh_error")),
        extra={name: value for name, value in values.items() if name not in KEYS})


def replaces(text: "str | bytes") -> "str | None":
    """The `replaces` of a file that from_json took."""
    return json.loads(text).get("replaces")


def _where(error: ValueError) -> str:
    # A JSONDecodeError quotes no content in msg; a UnicodeDecodeError would quote bytes.
    return f"{error.msg.removesuffix(' at')} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"


def _access_token(values: "Mapping[str, Any]") -> str:
    token = values.get("access_token")
    if not isinstance(token, str) or not B64TOKEN.fullmatch(token):
        raise ValueError("holds no access_token of RFC 6750's characters")
    return token


def _text(values: "Mapping[str, Any]", name: str) -> "str | None":
    value = values.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not PRINTABLE.fullmatch(value):
        raise ValueError(f"holds a {name} that is not printable ASCII")
    return value


def _number(value: Any) -> "float | None":
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if 0 <= value < 1e11 else None  # until the year 5138; keeps milliseconds, NaN and infinity out


def _refresh_error(value: Any) -> "RefreshError | None":
    if not isinstance(value, dict):
        return None
    return RefreshError(code=str(value.get("code")), description=str(value.get("description")),
                        at=_number(value.get("at")) or 0, terminal=value.get("terminal") is True,
                        retry_at=_number(value.get("retry_at")))
