"""A login: its tokens, their times, and what the last refreshes left to remember."""

import base64
import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from xaiproxy import config

# Codes of a RefreshError.
# The refresh token may be spent, and the next try may be hours away.
ANSWER_LOST = "answer_lost"
# No refresh has failed: upstream refuses the access token, and the next refresh may not begin yet.
UPSTREAM_REFUSES = "upstream_refuses"


class State(enum.Enum):
    """FRESH: use it. STALE: use it, and refresh it. INVALID: it has expired."""

    FRESH = "fresh"
    STALE = "stale"
    INVALID = "invalid"


@dataclasses.dataclass(frozen=True)
class RefreshError:
    """The failure of the last refresh. Times are unix seconds.

    `retry_at`: time of the next try; None if there is none.
    `terminal`: whether only a new login helps.
    `failures`: number of refreshes in a row that failed.
    `alike`: number of them, counted from the last one, that had this code.
    `token`: fingerprint of the refresh token that failed, or None.
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
    """A refresh token that was sent, or is about to be, without its successor in the file.

    `token`: its fingerprint. `first_at`, `next_at`: unix seconds at which it was first sent, and
    before which it may not be sent again. `tries`: times it was sent without a definite answer.
    """

    token: str
    first_at: float
    tries: int
    next_at: float


@dataclasses.dataclass(frozen=True)
class Asked:
    """The last refresh was made because upstream had refused the access token.

    `next_at`: unix seconds before which a refusal causes no other refresh.
    `wait`: how many seconds that was ahead.
    """

    next_at: float
    wait: float


@dataclasses.dataclass(frozen=True)
class Login:
    """Times are unix seconds. `extra`: unknown keys of the file, which survive a rewrite.

    `salt`: random text that is made at the sign-in and that renewals keep; None if the file is of
    another program.
    """

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
    salt: str | None = dataclasses.field(default=None, repr=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def issued_at(self) -> float | None:
        """Return the time of issue; None if neither the file nor the JWT has it."""
        if self.obtained_at is not None:
            return self.obtained_at
        return number(jwt_claims(self.access_token).get("iat"))

    def lifetime(self) -> float | None:
        """Return the seconds from issue to expiry; None if unknown."""
        begin = self.issued_at()
        return self.expires_at - begin if begin is not None and begin < self.expires_at else None

    def margin(self, skew: float) -> float:
        """Return the seconds before expiry from which the token is stale.

        `skew`, or a fifth of the lifetime if that is more, but never more than half of it.
        """
        lifetime = self.lifetime()
        return skew if lifetime is None else min(lifetime / 2, max(skew, lifetime / 5))

    def state(self, now: float, skew: float) -> State:
        """`skew`: as for `margin`."""
        left = self.expires_at - now
        if left <= 0:
            return State.INVALID
        return State.STALE if left < self.margin(skew) else State.FRESH

    def age(self, now: float) -> float:
        """Return the seconds since issue; infinity if unknown, or if the clock was set back."""
        begin = self.issued_at()
        return now - begin if begin is not None and begin <= now else math.inf


def fingerprint(token: str) -> str:
    """Return the SHA-256 in hex, which names a token without revealing it."""
    return hashlib.sha256(token.encode()).hexdigest()


def jwt_claims(token: str) -> dict[str, Any]:
    """Return the claims of a JWT, unverified, or {} if it is none; trust no more than its times."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def number(value: Any) -> float | None:
    """Return `value` if it can be a time, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Until the year 5138: no milliseconds, NaN or infinity.
    return value if 0 <= value < 1e11 else None


def is_refusal(body: bytes) -> bool:
    """Whether the body of a 403 of the API means that the access token is dead."""
    text = body.lower()
    return b"unauthenticated:" in text or b"could not be validated" in text
