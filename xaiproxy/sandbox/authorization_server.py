"""auth.x.ai and accounts.x.ai on one origin: discovery, grants, revocation, userinfo, keys."""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, request

from xaiproxy.sandbox import consent
from xaiproxy.sandbox.grants import (
    CLIENT_ID,
    SCOPES,
    TEAM_SCOPES,
    USER,
    Grants,
    OAuthError,
    Request,
)
from xaiproxy.sandbox.replies import Answer, page, reply
from xaiproxy.sandbox.xai_errors import error

DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
# Any port (RFC 8252 7.3), nothing else.
REDIRECT_URI = re.compile(r"http://127\.0\.0\.1:[0-9]{1,5}/callback")
CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")  # SHA-256 in base64url


class Unprocessable(Exception):
    """The body is not the form that the endpoint requires; the response is that of axum."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def create(grants: Grants) -> Blueprint:
    server = Blueprint("authorization_server", __name__)
    issuer = grants.issuer

    @server.errorhandler(OAuthError)
    def oauth_error(failure: OAuthError) -> Answer:
        return reply(failure.body, 400)

    @server.errorhandler(Unprocessable)
    def unprocessable(failure: Unprocessable) -> Answer:
        return reply(failure.text, failure.status)

    @server.get("/.well-known/openid-configuration")
    def discovery() -> Answer:
        return reply(
            {
                "issuer": issuer,
                "authorization_endpoint": f"{issuer}/oauth2/authorize",
                "device_authorization_endpoint": f"{issuer}/oauth2/device/code",
                "token_endpoint": f"{issuer}/oauth2/token",
                "userinfo_endpoint": f"{issuer}/oauth2/userinfo",
                "revocation_endpoint": f"{issuer}/oauth2/revoke",
                "jwks_uri": f"{issuer}/.well-known/jwks.json",
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
                "scopes_supported": SCOPES,
                "token_endpoint_auth_methods_supported": [
                    "client_secret_basic",
                    "client_secret_post",
                    "none",
                ],
                "grant_types_supported": ["authorization_code", "refresh_token", DEVICE_CODE],
                "code_challenge_methods_supported": ["S256"],
            }
        )

    @server.get("/.well-known/jwks.json")
    def keys() -> Answer:
        # Signatures here are HS256 with a secret of the process.
        return reply({"keys": []})

    @server.get("/oauth2/authorize")
    def authorize() -> Answer:
        try:
            asked = authorization_request(request.args)
        except ValueError as failure:
            return reply(consent.refusal_page(str(failure)), 400)
        return reply(consent.browser_page(grants.begin(asked), asked, grants.knobs.auto_approve))

    @server.post("/oauth2/authorize")
    def decide() -> Answer:
        """The request of the consent page: returns the URL to fetch, with the code or the error."""
        form = own_form()
        waiting = grants.requests.get(form.get("request", ""))
        if waiting is None or time.time() >= waiting.expires:
            raise Unprocessable(400, "This request is not waiting for a decision.")
        result = grants.decide(form["request"], form.get("decision") == "allow")
        return reply(
            {"url": f"{waiting.redirect_uri}?{urlencode(result)}", "code": result.get("code")}
        )

    @server.get("/oauth2/device")
    def device_page() -> Answer:
        return reply(consent.device_page(request.args.get("user_code", "")))

    @server.post("/oauth2/device")
    def device_decision() -> Answer:
        form = own_form()
        waiting = grants.waiting_device(form.get("user_code", ""))
        if waiting is None:
            return reply(consent.device_page("", "No login is waiting for this code."), 404)
        waiting.allowed = form.get("decision") == "allow"
        return reply(
            page(
                "Device",
                f"<h1>{'Signed in' if waiting.allowed else 'Access denied'}</h1>"
                "<p>You can close this window and return to your device.</p>",
            )
        )

    @server.post("/oauth2/device/code")
    def device_authorization() -> Answer:
        form = form_of("client_id")
        if form["client_id"] != CLIENT_ID:
            return error("invalid_client")
        scope = form.get("scope", "openid")
        for name in scope.split():
            if name in TEAM_SCOPES:
                raise OAuthError("invalid_scope", f"Scope {name} is not valid for User principals")
        if problem := unknown_scope(scope):
            raise OAuthError("invalid_scope", problem)
        challenge = form.get("code_challenge")
        s256 = form.get("code_challenge_method") == "S256"
        if challenge is not None and not (s256 and CHALLENGE.fullmatch(challenge)):
            raise OAuthError("invalid_request", "code_challenge_method must be S256")
        return reply(grants.device_authorization(scope, challenge))

    @server.post("/oauth2/token")
    def token() -> Answer:
        grants.witness.count("token_requests")
        form = form_of("grant_type")
        if form.get("client_id") != CLIENT_ID:
            return error("invalid_client")

        def need(name: str) -> str:
            if name not in form:
                raise OAuthError("invalid_request", f"Missing parameter: {name}")
            return form[name]

        if form["grant_type"] == "authorization_code":
            return reply(grants.exchange(need("code"), need("redirect_uri"), need("code_verifier")))
        if form["grant_type"] == "refresh_token":
            return reply(grants.refresh(need("refresh_token")))
        if form["grant_type"] == DEVICE_CODE:
            return reply(grants.poll(need("device_code"), form.get("code_verifier")))
        raise OAuthError("unsupported_grant_type")

    @server.post("/oauth2/revoke")
    def revoke() -> Answer:
        form = form_of("token")
        if form.get("client_id") != CLIENT_ID:
            return error("invalid_client")
        grants.witness.count("revocations")
        access = grants.access_tokens.get(form["token"])
        if family := grants.families.get(form["token"]) or (access and access.family):
            grants.revoke(family)
        # RFC 7009 2.2: also for an unknown token.
        return Answer(status=200)

    @server.get("/oauth2/userinfo")
    def userinfo() -> Answer:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not grants.check(token):
            challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # RFC 6750 3.1
            return reply({"error": "invalid_token"}, 401, challenge)
        return reply({**USER, "preferred_username": "sandbox"})

    def own_form() -> dict[str, str]:
        """A form posted by our own page, or by a program that sends no Origin."""
        if request.headers.get("Origin", issuer) != issuer:
            raise Unprocessable(403, "This form belongs to another page.")
        return form_of()

    return server


def authorization_request(query: Any) -> Request:
    """Check an authorization request (RFC 6749 4.1.1, RFC 7636 4.3); raises ValueError."""
    if repeated := [name for name in query if len(query.getlist(name)) > 1]:
        raise ValueError(f"Repeated parameter: {repeated[0]}")
    if query.get("client_id") != CLIENT_ID:
        raise ValueError("Unknown client")
    if not REDIRECT_URI.fullmatch(query.get("redirect_uri", "")):
        raise ValueError("Unknown redirect_uri")
    if query.get("response_type") != "code":
        raise ValueError("Unknown response_type")
    challenge = query.get("code_challenge", "")
    if query.get("code_challenge_method") != "S256" or not CHALLENGE.fullmatch(challenge):
        raise ValueError("PKCE with S256 is required")
    if problem := unknown_scope(query.get("scope", "")):
        raise ValueError(problem)
    now = time.time()
    return Request(
        query.get("scope", ""),
        challenge,
        now,
        now + 600,
        query["redirect_uri"],
        query.get("state"),
        query.get("nonce"),
    )


def unknown_scope(scope: str) -> str | None:
    return next((f"Unknown scope: {name}" for name in scope.split() if name not in SCOPES), None)


def form_of(*required: str) -> dict[str, str]:
    """The request's form. Raises Unprocessable for another body, a missing or repeated field."""
    if request.mimetype != "application/x-www-form-urlencoded":
        raise Unprocessable(
            415, "Form requests must have `Content-Type: application/x-www-form-urlencoded`"
        )
    for name in required:
        if name not in request.form:
            raise Unprocessable(422, f"Failed to deserialize form body: missing field `{name}`")
    for name, values in request.form.lists():
        if len(values) > 1:
            raise Unprocessable(422, f"Failed to deserialize form body: duplicate field `{name}`")
    return request.form.to_dict()
