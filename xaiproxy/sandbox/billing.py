"""The used share of the weekly pool: GET /v1/billing, which xAI has at cli-chat-proxy.grok.com."""

from __future__ import annotations

import datetime
import time
from typing import Any

from flask import Blueprint

from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply

WEEK = 7 * 86400  # seconds


def create(grants: Grants) -> Blueprint:
    billing = Blueprint("billing", __name__)
    knobs = grants.knobs

    @billing.get("/v1/billing")
    def credits() -> Answer:
        begin = time.time() // WEEK * WEEK
        period = {"start": moment(begin), "end": moment(begin + WEEK)}
        config: dict[str, Any] = {
            "currentPeriod": {"type": "USAGE_PERIOD_TYPE_WEEKLY", **period},
            "creditUsagePercent": knobs.credit_usage_percent,
            "onDemandCap": {"val": 0},
            "onDemandUsed": {"val": 0},
            "isUnifiedBillingUser": True,
            "prepaidBalance": {"val": knobs.prepaid_balance},
            "billingPeriodStart": period["start"],
            "billingPeriodEnd": period["end"],
        }
        # As in every JSON form of a protocol buffer, a member that is 0 is missing.
        if not knobs.credit_usage_percent:
            del config["creditUsagePercent"]
        return reply({"config": config, "subscriptionTier": knobs.subscription_tier})

    return billing


def moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat()
