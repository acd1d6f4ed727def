"""Answers as xAI words them: the catalogue of its errors, and how JSON, text and pages are sent."""
from __future__ import annotations

import json
from typing import Any

from werkzeug import Response

CAPACITY = ("The model is currently at capacity due to high demand. Please try again in a few minutes, or use a "
            "higher service tier for priority processing: "
            "https://docs.x.ai/developers/advanced-api-usage/priority-processing")
TEAM = "00000000-0000-4000-8000-00000000beef"


class Answer(Response):
    default_mimetype = None  # an empty answer has no Content-Type


def compact(value: Any) -> str:
    """JSON as xAI writes it: no spaces, its own key order, no escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """JSON for an object, plain text or HTML for a string; bytes as they are."""
    kind = "application/json"
    if isinstance(body, bytes):
        kind = "application/octet-stream"
    elif isinstance(body, str):
        kind = "text/html; charset=UTF-8" if body.startswith("<") else "text/plain; charset=utf-8"
    else:
        body = compact(body)
    response = Answer(body, status, content_type=kind)
    for name, value in (headers or {}).items():
        response.headers[name] = value
    return response


def page(title: str, content: str) -> str:
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
            f"{content}<hr><p>This page is from xai-sandbox, a simulation on your own machine. "
            f"It is <b>not xAI</b>.</p></body></html>")


def error(name: str) -> Answer:
    """An error from the catalogue."""
    status, body, *headers = ERRORS[name]
    return reply(body, status, *headers)


def _coded(code: Any, text: str) -> dict[str, Any]:
    return {"code": code, "error": text}


def _oauth(code: str, description: str | None = None) -> dict[str, str]:
    return {"error": code, "error_description": description} if description else {"error": code}


_CHALLENGE = page("Just a moment...", "<h1>Checking your browser</h1>")
_NO_SUBSCRIPTION = ("You have either run out of available resources or do not have an active Grok subscription. "
                    "Manage subscriptions at https://grok.com")
_NO_CREDITS = ("You have run out of credits or need a Grok subscription. Add credits at https://grok.com/?_s=usage or "
               "upgrade at https://grok.com/supergrok.")
_TEAM_SPENT = (f"Your team {TEAM} has either used all available credits or reached its monthly spending limit. To "
               "continue making API requests, please purchase more credits or raise your spending limit.")
_DENIED = ("Access to the chat endpoint is denied. Please ensure you're using the correct credentials. If you believe "
           "this is a mistake, please log into console.x.ai and update the permissions, or contact support.")
_FORBIDDEN = "The caller does not have permission to execute the specified operation"

# name: (status, body[, headers])
ERRORS: dict[str, tuple] = {
    # the authorization server
    "authorization_pending": (400, _oauth("authorization_pending", "User has not yet authorized")),
    "slow_down": (400, _oauth("slow_down")),
    "access_denied": (400, _oauth("access_denied", "The user rejected the request")),
    "expired_token": (400, _oauth("expired_token")),
    "invalid_grant": (400, _oauth("invalid_grant")),
    "refresh_token_revoked": (400, _oauth("invalid_grant", "Refresh token has been revoked")),
    "refresh_token_unknown": (400, _oauth("invalid_grant", "Invalid or unknown refresh token")),
    "invalid_client": (401, _oauth("invalid_client", "Unknown client")),
    "temporarily_unavailable": (400, _oauth("temporarily_unavailable")),
    "tier_denied": (403, _oauth("access_denied", "Your subscription does not include API access")),
    # in front of both
    "no_user_agent": (403, "error code: 1010"),
    "wrong_host": (403, page("Attention Required! | Cloudflare", "<h1>Sorry, you have been blocked</h1>")),
    "cloudflare_challenge": (403, _CHALLENGE, {"cf-mitigated": "challenge"}),
    "bad_gateway": (502, page("502 Bad gateway", "<h1>Bad gateway</h1>")),
    "web_server_down": (521, page("521: Web server is down", "<h1>Web server is down</h1>"), {"Retry-After": "60"}),
    "gateway_timeout": (524, page("524: A timeout occurred", "<h1>A timeout occurred</h1>")),
    # the API
    "unsupported_parameter": (400, _coded("invalid-argument",
                                          "Model grok-4.5 does not support parameter frequencyPenalty.")),
    "unsupported_argument": (400, _coded("400", "Argument not supported: logit_bias")),
    "invalid_image": (400, _coded("invalid_image", "Image dimensions 1x1 are too small. Both width and height must be "
                                                   "at least 8 pixels.")),
    "wrong_api_key": (400, _coded("invalid-argument", "Incorrect API key provided: xa***. You can obtain an API key "
                                                      "from https://console.x.ai.")),
    "context_overflow": (400, _coded("invalid-argument", "This model's maximum prompt length is 500000 but the request "
                                                         "contains 907154 tokens.")),
    "length_limit": (400, {"error": "Failed to read request body: length limit exceeded"}),
    "moderated": (400, _coded("imagine:content-moderated", "Generated image rejected by content moderation.")),
    "usage_guidelines": (403, _coded("permission-denied", "Content violates usage guidelines. "
                                                          "Failed check: SAFETY_CHECK_TYPE_BIO")),
    "no_credentials": (401, _coded("unauthenticated:no-credentials", "No credentials presented.")),
    "no_credentials_old": (401, _coded("The request does not have valid authentication credentials",
                                       "No credentials presented. [WKE=unauthenticated:no-credentials]")),
    "invalid_header": (401, _coded("unauthenticated:no-credentials",
                                   "No or an invalid authentication header was provided on the request.")),
    "bad_credentials": (403, _coded("unauthenticated:bad-credentials",
                                    "The OAuth2 access token could not be validated.")),
    "bad_credentials_old": (403, _coded(_FORBIDDEN, "The OAuth2 access token could not be validated. "
                                                    "[WKE=unauthenticated:bad-credentials]")),
    "spending_limit": (402, _coded("personal-team-blocked:spending-limit", _NO_CREDITS)),
    "spending_limit_403": (403, _coded("personal-team-blocked:spending-limit", _NO_CREDITS)),
    "spending_limit_429": (429, _coded(429, "You ran out of credits. [WKE=personal-team-blocked:spending-limit]")),
    "no_subscription": (403, _coded(_FORBIDDEN, _NO_SUBSCRIPTION)),
    "team_spent": (403, _coded("permission-denied", _TEAM_SPENT)),
    "team_spent_429": (429, _coded("Some resource has been exhausted", _TEAM_SPENT)),
    "chat_denied": (403, _coded("permission-denied", _DENIED)),
    "blocked_user": (403, _coded("unauthorized:blocked-user", "User is blocked")),
    "no_route": (404, _coded("Some requested entity was not found",
                             "No handler found on route. Please double check your URL and consult "
                             "https://api.x.ai/docs for more information.")),
    "no_model": (404, _coded("Some requested entity was not found",
                             f"The model grok-beta does not exist or your team {TEAM} does not have access to it. "
                             "Please ensure you're using the correct API key. If you believe this is a mistake, please "
                             "contact support and quote your team ID and the model name.")),
    "too_large": (413, page("413 Request Entity Too Large", "<h1>413 Request Entity Too Large</h1>")),
    "rate_limited": (429, _coded("resource-exhausted",
                                 f"Too many requests for team {TEAM} and model grok-4.5. Your team's rate limit is — "
                                 "Requests per Second (actual/limit): 2/2."), {"Retry-After": "1"}),
    "capacity": (429, _coded("Some resource has been exhausted",
                             "The service is temporarily at capacity. Please retry your request shortly.")),
    "free_usage": (429, _coded("subscription:free-usage-exhausted",
                               "You've used all the included free usage for model grok-4.5 for now. Usage resets over a "
                               "rolling 24-hour window — tokens (actual/limit): 100001/100000.")),
    "internal": (500, _coded("Internal error", "Internal error")),
    "internal_numeric": (500, _coded(500, "internal server error")),
    "unavailable": (503, _coded("The service is currently unavailable",
                                "Service temporarily unavailable. The model did not respond to this request.")),
}
