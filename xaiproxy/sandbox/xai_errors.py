"""Errors of xAI as observed, word for word."""

from __future__ import annotations

from typing import Any

from xaiproxy.sandbox.replies import Answer, page, reply

TEAM = "00000000-0000-4000-8000-00000000beef"
CAPACITY = (
    "The model is currently at capacity due to high demand. Please try again in a few minutes, "
    "or use a "
    "higher service tier for priority processing: "
    "https://docs.x.ai/developers/advanced-api-usage/priority-processing"
)
_NO_CREDITS = (
    "You have run out of credits or need a Grok subscription. Add credits at "
    "https://grok.com/?_s=usage or "
    "upgrade at https://grok.com/supergrok."
)
_TEAM_SPENT = (
    f"Your team {TEAM} has either used all available credits or reached its monthly spending "
    "limit. To "
    "continue making API requests, please purchase more credits or raise your spending limit."
)
_NOT_FOUND = "Some requested entity was not found"
_FORBIDDEN = "The caller does not have permission to execute the specified operation"
_EXHAUSTED = "Some resource has been exhausted"
_UNAVAILABLE = "The service is currently unavailable"


def error(name: str) -> Answer:
    """An error from the catalogue."""
    status, body, *headers = ERRORS[name]
    return reply(body, status, *headers)


def oauth(code: str, description: str | None = None) -> dict[str, str]:
    """An error response of RFC 6749 5.2."""
    return {"error": code, "error_description": description} if description else {"error": code}


def _coded(code: Any, text: str) -> dict[str, Any]:
    return {"code": code, "error": text}


def _html(title: str) -> str:
    return page(title, f"<h1>{title}</h1>")


# name: (status, body[, headers])
ERRORS: dict[str, tuple[Any, ...]] = {
    # the authorization server
    "authorization_pending": (400, oauth("authorization_pending", "User has not yet authorized")),
    "slow_down": (400, oauth("slow_down")),
    "access_denied": (400, oauth("access_denied", "The user rejected the request")),
    "expired_token": (400, oauth("expired_token")),
    "invalid_grant": (400, oauth("invalid_grant")),
    "refresh_token_revoked": (400, oauth("invalid_grant", "Refresh token has been revoked")),
    "refresh_token_unknown": (400, oauth("invalid_grant", "Invalid or unknown refresh token")),
    "invalid_client": (401, oauth("invalid_client", "Unknown client")),
    "temporarily_unavailable": (400, oauth("temporarily_unavailable")),
    "tier_denied": (403, oauth("access_denied", "Your subscription does not include API access")),
    # in front of both
    "no_user_agent": (403, "error code: 1010"),
    "wrong_host": (403, _html("Attention Required! | Cloudflare")),
    "cloudflare_challenge": (403, _html("Just a moment..."), {"cf-mitigated": "challenge"}),
    "too_large": (413, _html("413 Request Entity Too Large")),
    "bad_gateway": (502, _html("502 Bad gateway")),
    "web_server_down": (521, _html("521: Web server is down"), {"Retry-After": "60"}),
    "timeout_occurred": (524, _html("524: A timeout occurred")),
    # the API: credentials
    "no_credentials": (401, _coded("unauthenticated:no-credentials", "No credentials presented.")),
    "no_credentials_old": (
        401,
        _coded(
            "The request does not have valid authentication credentials",
            "No credentials presented. [WKE=unauthenticated:no-credentials]",
        ),
    ),
    "invalid_header": (
        401,
        _coded(
            "unauthenticated:no-credentials",
            "No or an invalid authentication header was provided on the request.",
        ),
    ),
    "bad_credentials": (
        403,
        _coded(
            "unauthenticated:bad-credentials", "The OAuth2 access token could not be validated."
        ),
    ),
    "bad_credentials_old": (
        403,
        _coded(
            _FORBIDDEN,
            "The OAuth2 access token could not be validated. [WKE=unauthenticated:bad-credentials]",
        ),
    ),
    "wrong_api_key": (
        400,
        _coded(
            "invalid-argument",
            "Incorrect API key provided: xa***. You can obtain an API key from "
            "https://console.x.ai.",
        ),
    ),
    # the API: what the account may do
    "spending_limit": (402, _coded("personal-team-blocked:spending-limit", _NO_CREDITS)),
    "spending_limit_403": (403, _coded("personal-team-blocked:spending-limit", _NO_CREDITS)),
    "spending_limit_429": (
        429,
        _coded(429, "You ran out of credits. [WKE=personal-team-blocked:spending-limit]"),
    ),
    "no_subscription": (
        403,
        _coded(
            _FORBIDDEN,
            "You have either run out of available resources or do not have an active Grok "
            "subscription. Manage "
            "subscriptions at https://grok.com",
        ),
    ),
    "team_spent": (403, _coded("permission-denied", _TEAM_SPENT)),
    "team_spent_429": (429, _coded(_EXHAUSTED, _TEAM_SPENT)),
    "chat_denied": (
        403,
        _coded(
            "permission-denied",
            "Access to the chat endpoint is denied. Please ensure you're using the correct "
            "credentials. If you "
            "believe this is a mistake, please log into console.x.ai and update the permissions, "
            "or contact "
            "support.",
        ),
    ),
    "team_not_authorized": (403, _coded("permission-denied", "Team is not authorized")),
    "blocked_user": (403, _coded("unauthorized:blocked-user", "User is blocked")),
    # the API: what was asked
    "unsupported_parameter": (
        400,
        _coded("invalid-argument", "Model grok-4.5 does not support parameter frequencyPenalty."),
    ),
    "unsupported_argument": (400, _coded("400", "Argument not supported: logit_bias")),
    "invalid_image": (
        400,
        _coded(
            "invalid_image",
            "Image dimensions 1x1 are too small. Both width and height must be at least 8 pixels.",
        ),
    ),
    "context_overflow": (
        400,
        _coded(
            "invalid-argument",
            "This model's maximum prompt length is 500000 but the request contains 907154 tokens.",
        ),
    ),
    "length_limit": (400, {"error": "Failed to read request body: length limit exceeded"}),
    "moderated": (
        400,
        _coded("imagine:content-moderated", "Generated image rejected by content moderation."),
    ),
    "usage_guidelines": (
        403,
        _coded(
            "permission-denied",
            "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO",
        ),
    ),
    "no_route": (
        404,
        _coded(
            _NOT_FOUND,
            "No handler found on route. Please double check your URL and consult "
            "https://api.x.ai/docs for more "
            "information.",
        ),
    ),
    "no_model": (
        404,
        _coded(
            _NOT_FOUND,
            f"The model grok-beta does not exist or your team {TEAM} does not have access to it. "
            "Please ensure "
            "you're using the correct API key. If you believe this is a mistake, please contact "
            "support and "
            "quote your team ID and the model name.",
        ),
    ),
    # the API: not now
    "rate_limited": (
        429,
        _coded(
            "resource-exhausted",
            f"Too many requests for team {TEAM} and model grok-4.5. Your team's rate limit is — "
            "Requests per "
            "Second (actual/limit): 2/2.",
        ),
        {"Retry-After": "1"},
    ),
    "capacity": (
        429,
        _coded(
            _EXHAUSTED, "The service is temporarily at capacity. Please retry your request shortly."
        ),
    ),
    "free_usage": (
        429,
        _coded(
            "subscription:free-usage-exhausted",
            "You've used all the included free usage for model grok-4.5 for now. Usage resets "
            "over a rolling "
            "24-hour window — tokens (actual/limit): 100001/100000.",
        ),
    ),
    "internal": (500, _coded("Internal error", "Internal error")),
    "internal_numeric": (500, _coded(500, "internal server error")),
    "unavailable": (
        503,
        _coded(
            _UNAVAILABLE,
            "Service temporarily unavailable. The model did not respond to this request.",
        ),
    ),
}
