"""The state of the authorization server: codes, device codes, and the tokens issued for them.

A login is a family of tokens. Its refresh token is rotated at every use, and presenting a former
one revokes the family with its access tokens (RFC 9700 4.14.2). Nothing here knows HTTP; failures
are OAuthErrors.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from xaiproxy.sandbox.knobs import Knobs
from xaiproxy.sandbox.replies import compact
from xaiproxy.sandbox.witness import Witness
from xaiproxy.sandbox.xai_errors import TEAM, oauth

# The Grok CLI's public client; no other is registered.
CLIENT_ID = "b1a00492-073a-47ea-816f-4c329264a828"
SCOPES = [
    "openid",
    "profile",
    "email",
    "offline_access",
    "grok-cli:access",
    "team:read",
    "org:read",
    "api:access",
    "conversations:read",
    "conversations:write",
    "workspaces:read",
    "workspaces:write",
]
TEAM_SCOPES = {"team:read", "org:read"}  # valid, but not for the one user here
USER = {
    "sub": "00000000-0000-4000-8000-00000000cafe",
    "email": "sandbox@example.invalid",
    "name": "Sandy Box",
    "given_name": "Sandy",
    "family_name": "Box",
    "picture": "",
}
USER_CODE_LETTERS = "BCDFGHJKLMNPQRSTVWXZ23456789"  # RFC 8628 6.1: no ambiguous characters
VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")


class OAuthError(Exception):
    """An error response of RFC 6749 5.2: code, and possibly a description."""

    def __init__(self, code: str, description: str | None = None) -> None:
        super().__init__(code)
        self.body = oauth(code, description)


@dataclass(eq=False)
class Family:
    """A login and all tokens issued for it."""

    scope: str
    refresh_token: str = ""
    former: dict[str, float] = field(default_factory=dict)  # time of rotation, by refresh token
    revoked: bool = False


@dataclass
class Request:
    """A login that waits for approval: an authorization request or a device code."""

    scope: str
    challenge: str | None
    begun: float
    expires: float
    redirect_uri: str | None = None
    state: str | None = None
    nonce: str | None = None
    user_code: str = ""
    interval: float = 0
    last_poll: float = 0
    allowed: bool | None = None
    used: bool = False
    family: Family | None = None


@dataclass
class AccessToken:
    family: Family
    expires: float
    refusals: int
    revoked: bool = False


class Grants:
    def __init__(self, issuer: str, knobs: Knobs, witness: Witness) -> None:
        self.issuer, self.knobs, self.witness = issuer, knobs, witness
        self.requests: dict[str, Request] = {}  # on a consent page, by an opaque id
        self.codes: dict[str, Request] = {}
        self.device_codes: dict[str, Request] = {}
        self.families: dict[str, Family] = {}  # by each of their refresh tokens, former ones too
        self.access_tokens: dict[str, AccessToken] = {}
        self.client_secrets: dict[str, float] = {}  # expiry, by secret; each for one WebSocket
        self._secret = secrets.token_bytes(32)

    # authorization code, RFC 6749 4.1 with RFC 7636

    def begin(self, request: Request) -> str:
        handle = secrets.token_urlsafe(16)
        self.requests[handle] = request
        return handle

    def decide(self, handle: str, allow: bool) -> dict[str, str]:
        """Record the decision; return the parameters for the redirect. Raises KeyError."""
        request = self.requests.pop(handle)
        state = {"state": request.state} if request.state is not None else {}
        if not allow:
            return {"error": "access_denied", "error_description": "User denied", **state}
        code = secrets.token_urlsafe(32)
        request.expires = time.time() + self.knobs.code_lifetime
        self.codes[code] = request
        self.witness.count("authorizations")
        return {"code": code, **state}

    def exchange(self, code: str, redirect_uri: str, verifier: str) -> dict[str, Any]:
        request = self.codes.get(code)
        if request is None:
            raise OAuthError("invalid_grant")
        # RFC 6749 4.1.2: a code that is used twice may have been stolen.
        if request.used and request.family:
            self.revoke(request.family)
        if request.used or time.time() >= request.expires:
            raise OAuthError("invalid_grant")
        # Before the checks that may fail: there is only one guess at the verifier.
        request.used = True
        if redirect_uri != request.redirect_uri or not matches(verifier, request.challenge or ""):
            raise OAuthError("invalid_grant")
        self.witness.count("code_exchanges")
        return self._login(request)

    # device authorization, RFC 8628

    def device_authorization(self, scope: str, challenge: str | None) -> dict[str, Any]:
        code, knobs = secrets.token_urlsafe(64), self.knobs
        letters = "".join(secrets.choice(USER_CODE_LETTERS) for _ in range(8))
        now = time.time()
        request = Request(
            scope,
            challenge,
            now,
            now + knobs.device_lifetime,
            interval=knobs.device_interval,
            user_code=f"{letters[:4]}-{letters[4:]}",
            last_poll=now,
        )
        self.device_codes[code] = request
        self.witness.count("device_requests")
        page = f"{self.issuer}/oauth2/device"
        return {
            "device_code": code,
            "user_code": request.user_code,
            "verification_uri": page,
            "verification_uri_complete": f"{page}?user_code={request.user_code}",
            "expires_in": int(knobs.device_lifetime),
            "interval": knobs.device_interval,
        }

    def waiting_device(self, user_code: str) -> Request | None:
        """The undecided request with this user code, or None."""
        return next(
            (
                request
                for request in self.device_codes.values()
                if request.user_code == user_code.upper()
                and request.allowed is None
                and time.time() < request.expires
            ),
            None,
        )

    def poll(self, device_code: str, verifier: str | None) -> dict[str, Any]:
        self.witness.count("device_polls")
        request, now = self.device_codes.get(device_code), time.time()
        if request is None or request.used:
            raise OAuthError("invalid_grant")
        if now >= request.expires:
            raise OAuthError("expired_token")
        if request.allowed is None and self.knobs.auto_approve is not None:
            request.allowed = now >= request.begun + self.knobs.auto_approve or None
        too_fast = request.allowed is None and now - request.last_poll < request.interval
        request.last_poll = now
        if too_fast or self.knobs.slow_downs:
            self.knobs.slow_downs = max(0, self.knobs.slow_downs - 1)
            # RFC 8628 3.5: for this poll and all later ones.
            request.interval += 5
            self.witness.count("slow_downs")
            raise OAuthError("slow_down")
        if request.allowed is None:
            raise OAuthError("authorization_pending", "User has not yet authorized")
        request.used = True
        if not request.allowed:
            raise OAuthError("access_denied", "The user rejected the request")
        if request.challenge and not matches(verifier or "", request.challenge):
            raise OAuthError("invalid_grant")
        return self._login(request)

    # refresh, RFC 6749 6

    def refresh(self, token: str) -> dict[str, Any]:
        family = self.families.get(token)
        if family is None:
            raise OAuthError("invalid_grant", "Invalid or unknown refresh token")
        rotated = family.former.get(token)
        in_grace = rotated is not None and time.time() - rotated < self.knobs.grace
        if rotated is not None and not in_grace and not family.revoked:
            self.witness.count("reuses")
            self.revoke(family)
        if family.revoked:
            raise OAuthError("invalid_grant", "Refresh token has been revoked")
        self.witness.count("refreshes")
        if self.knobs.send_refresh_token:
            family.former.setdefault(family.refresh_token, time.time())
            self._rotate(family)
            return self._tokens(family, refresh_token=family.refresh_token)
        return self._tokens(family)

    # tokens

    def check(self, token: str) -> Family | None:
        """The login of an access token that the API accepts, or None."""
        access = self.access_tokens.get(token)
        if (
            access is None
            or access.revoked
            or access.family.revoked
            or time.time() >= access.expires
        ):
            return None
        if access.refusals:
            access.refusals -= 1
            return None
        return access.family

    def mint_secret(self, seconds: int) -> dict[str, Any]:
        value = f"xai-realtime-client-secret-{secrets.token_urlsafe(24)}"
        expires = time.time() + seconds
        self.client_secrets[value] = expires
        return {"value": value, "expires_at": int(expires)}

    def take_secret(self, value: str | None) -> bool:
        """Whether this client secret is valid; it cannot be used again."""
        return value is not None and self.client_secrets.pop(value, 0) > time.time()

    def revoke(self, family: Family) -> None:
        if not family.revoked:
            family.revoked = True
            self.witness.count("revoked_families")

    def _login(self, request: Request) -> dict[str, Any]:
        family, now = Family(request.scope), int(time.time())
        request.family = family
        self.witness.count("logins")
        extra = {}
        if "offline_access" in request.scope.split():
            self._rotate(family)
            extra["refresh_token"] = family.refresh_token
        if "openid" in request.scope.split():
            claims = {"iss": self.issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 3600, **USER}
            nonce = {"nonce": request.nonce} if request.nonce is not None else {}
            extra["id_token"] = self._jwt({**claims, **nonce})
        return self._tokens(family, **extra)

    def _rotate(self, family: Family) -> None:
        family.refresh_token = secrets.token_urlsafe(64)
        self.families[family.refresh_token] = family

    def _tokens(self, family: Family, **extra: str) -> dict[str, Any]:
        now, lifetime = time.time(), self.knobs.access_token_lifetime
        token = self._jwt(
            {
                "iss": self.issuer,
                "aud": CLIENT_ID,
                "sub": USER["sub"],
                "exp": int(now) + lifetime,
                "iat": int(now),
                "scope": family.scope,
                "client_id": CLIENT_ID,
                "jti": str(uuid.uuid4()),
                "principal_type": "User",
                "principal_id": USER["sub"],
                "team_id": TEAM,
                "tier": 1,
                "bot_flag_source": 0,
            }
        )
        self.access_tokens[token] = AccessToken(family, now + lifetime, self.knobs.refuse_fresh)
        expires = {"expires_in": lifetime} if self.knobs.send_expires_in else {}
        return {
            "access_token": token,
            "token_type": "Bearer",
            **expires,
            **extra,
            "scope": family.scope,
        }

    def _jwt(self, claims: dict[str, Any]) -> str:
        head = {"alg": "HS256", "typ": "JWT"}
        signed = b".".join(_base64url(compact(part).encode()) for part in (head, claims))
        return b".".join((signed, _base64url(hmac.digest(self._secret, signed, "sha256")))).decode()


def matches(verifier: str, challenge: str) -> bool:
    """PKCE, S256 (RFC 7636 4.1 and 4.6)."""
    if not VERIFIER.fullmatch(verifier):
        return False
    return hmac.compare_digest(
        _base64url(hashlib.sha256(verifier.encode()).digest()), challenge.encode()
    )


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
