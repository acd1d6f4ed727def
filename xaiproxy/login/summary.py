"""What --status shows: the login, its refresher, its quota and the proxy.

It comes from the files and from the proxy's health checks. Nothing is refreshed, written or locked.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from xaiproxy import errors, judgement, quota, refresher_status, token_store, tokens
from xaiproxy.judgement import Judgement, Verdict
from xaiproxy.login import local_proxy
from xaiproxy.login.local_proxy import OTHER_SETTINGS, Listener, LocalProxy
from xaiproxy.quota import Quota
from xaiproxy.refresher_status import Status

# Members that change though nothing has happened.
VOLATILE = {"refresher_seen_at"}
# Members that are null without a login.
OF_LOGIN = ("account", "issuer", "obtained_at", "expires_at", "refresh_error")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Times are unix seconds.

    `refresher_seen_at`: time of the last heartbeat; None if there has been none.
    `refresher`: status of the refresher, if it is recent and about this login.
    `proxy`: None if its port is not known.
    `quota_error`: why the quota was not asked for, or is not remembered.
    """

    at: float
    store: token_store.TokenStore
    login: tokens.Login | errors.LoginUnusable
    verdict: Judgement
    refresher_seen_at: float | None
    refresher_alive: bool
    refresher: Status | None
    proxy: LocalProxy | None
    quota: Quota | None
    quota_error: errors.Error | None = None

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code or (self.quota_error.exit_code if self.quota_error else 0)

    @property
    def headline(self) -> str:
        """Whether requests are served, and if not, what to type."""
        if isinstance(self.login, errors.LoginUnusable):
            return str(self.login)
        proxy, verdict = self.proxy, self.verdict
        # The judgement is for clients as well, so it has no path of the checkout.
        reason = verdict.reason.replace(judgement.SIGN_IN, errors.SIGN_IN)
        no_refresher = verdict.verdict is Verdict.NO_REFRESHER
        if verdict.exit_code == 0 and proxy is not None:
            if proxy.kind is Listener.NOTHING:
                idle = "neither the proxy nor the refresher is" if no_refresher else "no proxy is"
                return f"not serving: {idle} running; start {errors.SERVE}"
            if proxy.kind is not Listener.PROXY:
                return f"not serving: no proxy answers at {proxy.url}"
            if not proxy.ready:
                return f"not serving: the proxy at {proxy.url} is not ready: {proxy.reason}"
        if no_refresher:
            reason += f"; start {errors.SERVE}"
        if not verdict.ready:
            return f"not serving: {reason}"
        if proxy is None or not proxy.ready:
            return reason
        if proxy.has_other_settings(verdict):
            return f"{reason}; the proxy at {proxy.url} {OTHER_SETTINGS}"
        texts = [proxy.warning] if proxy.warning else []
        if verdict.verdict is not Verdict.GOOD:
            texts.insert(0, reason)
        return f"serving {proxy.api}" + (f": {'; '.join(texts)}" if texts else "")

    @property
    def next_refresh_at(self) -> float | None:
        """The time of the next renewal or try, or None if none is planned."""
        login, status = self.login, self.refresher
        if isinstance(login, errors.LoginUnusable) or not self.refresher_alive:
            return None
        return refresher_status.next_refresh(login, status, self.store.settings.refresh_skew)

    def members(self) -> dict[str, Any]:
        """Return everything as members of a JSON object."""
        login = self.login
        if isinstance(login, errors.LoginUnusable):
            state, of_login = login.state, dict.fromkeys(OF_LOGIN)
        else:
            state = login.state(self.at, self.store.settings.refresh_skew).value
            of_login = {
                "account": login.account,
                "issuer": login.issuer,
                "obtained_at": login.issued_at(),
                "expires_at": login.expires_at,
                "refresh_error": login.refresh_error and dataclasses.asdict(login.refresh_error),
            }
        return {
            "usable": self.verdict.exit_code == 0,
            "verdict": self.verdict.verdict.value,
            "reason": self.verdict.reason,
            "state": state,
            "message": self.headline,
            **of_login,
            "next_refresh_at": self.next_refresh_at,
            "token_path": str(self.store.path),
            "refresher_alive": self.refresher_alive,
            "refresher_seen_at": self.refresher_seen_at,
            "refresher": self.refresher and _of_status(self.refresher),
            "proxy": self.proxy
            and {**dataclasses.asdict(self.proxy), "kind": self.proxy.kind.value},
            "quota": self.quota and dataclasses.asdict(self.quota),
            "quota_error": str(self.quota_error) if self.quota_error else None,
        }

    def lasting(self) -> dict[str, Any]:
        """Return the members without those that change though nothing has happened."""
        return {name: value for name, value in self.members().items() if name not in VOLATILE}


def _of_status(status: Status) -> dict[str, Any]:
    names = ("result", "reason", "next_try", "no_room", "published_at", "publish_failure")
    return {name: getattr(status, name) for name in names}


def of(
    store: token_store.TokenStore,
    now: float,
    known: Quota | None = None,
    quota_error: errors.Error | None = None,
) -> Summary:
    """Read the summary.

    `known`: the quota, if it was asked for just now; else the remembered one is shown.
    """
    login: tokens.Login | errors.LoginUnusable
    refused, status = False, None
    try:
        login = store.load()
        refused = store.is_refused(login, now)
        status = refresher_status.read(store, login, now)
    except errors.LoginUnusable as error:
        login = error
    age = store.refresher_age(now)
    return Summary(
        now,
        store,
        login,
        judgement.judge(login, now, age, refused, status, elsewhere=bool(store.settings.refresher)),
        None if age is None else now - age,
        store.refresher_alive(now),
        status,
        local_proxy.find(store.settings) if store.settings.has_known_address else None,
        known or quota.read(store),
        quota_error,
    )
