"""The metrics of the login and its refreshes: what the files have, read at each scrape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from xaiproxy import errors, judgement, refresher_status
from xaiproxy.metric_family import counter, from_zero, gauge, known
from xaiproxy.token_store import TokenStore


def families(store: TokenStore, now: float) -> Iterator[Metric]:
    required = judgement.of(store, now).exit_code == errors.EXIT_SIGN_IN
    expiry = obtained = next_at = None
    renewable = True
    with contextlib.suppress(errors.LoginUnusable):
        login = store.last_known()
        expiry, obtained = login.expires_at, login.issued_at()
        renewable = login.refresh_token is not None
        status = refresher_status.read(store, login, now)
        next_at = refresher_status.next_refresh(login, status, store.settings.refresh_skew)
    age = store.refresher_age(now)
    yield gauge("xaiproxy_login_required", "1 if only a sign-in helps, else 0.", (), [(required,)])
    yield gauge(
        "xaiproxy_access_token_expiry_timestamp_seconds",
        "Expiry of the access token in unix time; absent without a login.",
        (),
        known(expiry),
    )
    yield gauge(
        "xaiproxy_access_token_obtained_timestamp_seconds",
        "Issue of the access token in unix time; absent if unknown.",
        (),
        known(obtained),
    )
    yield gauge(
        "xaiproxy_refresher_seen_timestamp_seconds",
        "Last heartbeat of the refresher in unix time; 0 without one, absent if none is needed.",
        (),
        known((0 if age is None else now - age) if renewable else None),
    )
    yield gauge(
        "xaiproxy_refresh_next_timestamp_seconds",
        "Next refresh in unix time; absent if none is planned.",
        (),
        known(next_at),
    )
    yield counter(
        "xaiproxy_refreshes",
        "Refreshes of the login, by result.",
        ("result",),
        from_zero(refresher_status.RESULTS, refresher_status.refreshes(store)),
    )
    published_at, failures = refresher_status.published(store)
    yield gauge(
        "xaiproxy_published_timestamp_seconds",
        "Last time that the login was published in unix time; 0 if it never was.",
        (),
        [(published_at or 0,)],
    )
    yield counter("xaiproxy_publish_failures", "Failures to publish the login.", (), [(failures,)])
