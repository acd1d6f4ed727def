"""The data of the status page, /status.json.

Key holders get to see it: it has no path, no text that a server wrote, and nothing secret.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import xaiproxy
from xaiproxy import errors, judgement, provider, quota, refresher_status, token_store
from xaiproxy.judgement import Verdict
from xaiproxy.proxy.numbers import Numbers, Source

# What to type; without a path of the checkout.
COMMANDS = {
    Verdict.FAILING: "xai-login --doctor",
    Verdict.NO_ROOM: "xai-login --doctor",
    Verdict.NO_REFRESHER: "xai-refresher",
    Verdict.NO_REFRESH_TOKEN: "xai-login --device",
    Verdict.REFUSED: "xai-login --doctor",
    Verdict.EXPIRED: "xai-login --doctor",
    Verdict.ENDED: "xai-login --device",
    Verdict.NO_LOGIN: "xai-login --device",
    Verdict.UNUSABLE: "xai-login --device",
    Verdict.UNREAD: "xai-login --doctor",
}


class Status:
    def __init__(self, store: token_store.TokenStore, source: Source):
        self._store = store
        self._source = source
        self._skew = store.settings.refresh_skew
        # Whether `xai-login --status --quota` knows how to ask.
        self._asks_quota = provider.is_xai(store.settings.client_id, store.settings.issuer)

    def members(self, now: float) -> dict[str, Any]:
        """Every member is there; None for what is not known. Times are unix seconds."""
        seen, numbers = quota.read(self._store), self._source()
        gauges = numbers.gauges
        return {
            "at": now,
            "started_at": numbers.started_at,
            "version": xaiproxy.__version__,
            "workers": numbers.workers,
            **self._verdict(numbers, now),
            "token": self._token(now),
            "now": {
                "in_flight": gauges["in_flight"],
                "streams": gauges["streams"],
                "websockets": gauges["websockets"],
                "connections": gauges["connections"],
                "connections_limit": gauges["connections_limit"],
            },
            "hour": numbers.history.minutes(now),
            "quota": seen and dataclasses.asdict(seen),
            "asks_quota": self._asks_quota,
            "rate_limits": numbers.history.rate_limits(),
            "tokens_today": numbers.history.tokens_today(now),
        }

    def _verdict(self, numbers: Numbers, now: float) -> dict[str, Any]:
        """What comes first: whether requests are served, and what to type."""
        found = judgement.of(self._store, now)
        good = found.verdict is Verdict.GOOD
        trouble = numbers.trouble if found.ready else ""
        sentences = [] if trouble and good else [found.sentence]
        if trouble:
            sentences.append(f"{trouble[0].upper()}{trouble[1:]}.")
        if not found.ready:
            state = "not_serving"
        elif numbers.is_saturated:
            state = "saturated"
        else:
            state = "serving" if good and not trouble else "attention"
        return {
            "state": state,
            "verdict": found.verdict.value,
            "sentence": " ".join(sentences),
            "command": COMMANDS.get(found.verdict),
        }

    def _token(self, now: float) -> dict[str, Any] | None:
        try:
            login = self._store.last_known()
        except errors.LoginUnusable:
            return None
        next_refresh = None
        if self._store.refresher_alive(now):
            status = refresher_status.read(self._store, login, now)
            next_refresh = refresher_status.next_refresh(login, status, self._skew)
        return {
            "obtained_at": login.issued_at(),
            "next_refresh_at": next_refresh,
            "expires_at": login.expires_at,
            "refused": self._store.is_refused(login, now),
        }
