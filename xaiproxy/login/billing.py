"""The request to xAI's billing endpoint: how much of the account's quota is used.

For a login of auth.x.ai that endpoint is at cli-chat-proxy.grok.com. For a login of the sandbox it
is at the upstream, since no other host may get that access token. Other providers are not asked.
"""

import datetime
import re
import urllib.parse
from typing import Any

from xaiproxy import config, errors, provider, quota, tokens
from xaiproxy.oauth.session import Answer, Session
from xaiproxy.quota import TIER, WORD, Quota
from xaiproxy.token_store import TokenStore

ORIGIN = "https://cli-chat-proxy.grok.com"
PATH = "/v1/billing?format=credits"
# The kind of the access token, without which that host does not know it.
HEADERS = {"X-XAI-Token-Auth": "xai-grok-cli"}
DEADLINE = 10.0  # seconds
REASONS = {
    401: "it refuses the access token",
    403: "it refuses the access token, or the account's plan has no quota to show",
    404: "it has no such endpoint for this account",
    426: "it answers only newer programs",
    429: "too many requests; try again later",
}
BLOCKED = (
    "Cloudflare, or a proxy of your network, blocks this machine; try another network, or set "
    "HTTPS_PROXY"
)


def ask(
    store: TokenStore, now: float, deadline: float = DEADLINE
) -> tuple[Quota | None, errors.Error | None]:
    """Ask with the access token as it is, and remember the quota.

    Return the quota, or why there is none. A quota that cannot be remembered is returned as well.
    """
    found = None
    try:
        login = store.load()
        if login.expires_at <= now:
            return None, errors.Error("not asked, because the access token has expired")
        if not provider.is_xai(login.client_id, login.issuer):
            return None, errors.IssuerUnavailable(
                f"not asked, because {provider.name(store.settings)} has no known way to ask"
            )
        found = _request(store.settings, login, now, deadline)
        quota.write(store, login, found)
    except errors.LoginUnusable as error:
        return None, errors.Error(f"not asked, because no login can be used ({error.state})")
    except errors.StorageError as error:
        return found, errors.StorageError(f"not remembered: {error}")
    except errors.Error as error:
        return found, error
    return found, None


def _request(settings: config.Config, login: tokens.Login, now: float, deadline: float) -> Quota:
    """Raises IssuerUnavailable."""
    of_xai = login.issuer == config.DEFAULT_ISSUER
    url = (ORIGIN if of_xai else settings.upstream) + PATH
    session = Session(settings, address_from="HTTPS_PROXY" if of_xai else "XAI_PROXY_UPSTREAM")
    headers = {"Authorization": f"Bearer {login.access_token}", **HEADERS}
    answer = session.get(url, deadline, headers)
    try:
        if answer.status != 200 or answer.is_html:
            raise ValueError(_reason(answer))
        return quota_of(answer.json() or {}, now)
    except ValueError as problem:
        host = urllib.parse.urlsplit(url).netloc
        raise errors.IssuerUnavailable(
            f"{host} returned no quota ({answer.summary}): {problem}"
        ) from None


def _reason(answer: Answer) -> str:
    if answer.is_html:
        return BLOCKED
    if answer.status in REASONS:
        return REASONS[answer.status]
    if 300 <= answer.status < 400:
        return "a redirect is not followed with an access token"
    return "it has a failure; try again later" if answer.status >= 500 else "it is no quota"


def quota_of(body: dict[str, Any], now: float) -> Quota:
    """Raises ValueError with a description of what is wrong."""
    about = _object(body.get("config"))
    period = _object(about.get("currentPeriod"))
    if not about:
        raise ValueError("its body has no config")
    used = about.get("creditUsagePercent")
    # As in every JSON form of a protocol buffer, a member that is 0 is missing.
    if used is None and period:
        used = 0
    percent = _number(used)
    if percent is None:
        raise ValueError("its creditUsagePercent is missing, or no number")
    balance = _object(about.get("prepaidBalance"))
    tier = body.get("subscriptionTier") or about.get("subscriptionTier")
    kind = str(period.get("type", "")).removeprefix("USAGE_PERIOD_TYPE_").lower()
    found = Quota(
        now,
        percent,
        kind if WORD.fullmatch(kind) else "",
        _moment(period.get("start") or about.get("billingPeriodStart")),
        _moment(period.get("end") or about.get("billingPeriodEnd")),
        _number(balance.get("val", 0)) if "prepaidBalance" in about else None,
        tier if isinstance(tier, str) and TIER.fullmatch(tier) else "",
    )
    if not found.is_valid():
        raise ValueError("its numbers make no sense")
    return found


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A number, also in a string: the JSON form of a protocol buffer has long integers so."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", value):
        return float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _moment(value: Any) -> float | None:
    """Unix seconds of a date of RFC 3339, or None."""
    found = re.fullmatch(r"([0-9-]{10}T[0-9:]{8})(?:\.[0-9]+)?(Z|[+-][0-9:]{5})", str(value))
    if found is None:
        return None
    zone = found[2].replace("Z", "+00:00")
    try:
        return tokens.number(datetime.datetime.fromisoformat(found[1] + zone).timestamp())
    except ValueError:
        return None
