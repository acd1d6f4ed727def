"""Checks of --doctor over the network: routes, issuer, clock, proxy."""

import dataclasses
import re
import urllib.parse
from collections.abc import Callable, Mapping

from xaiproxy import addresses, config, errors
from xaiproxy.judgement import Judgement
from xaiproxy.login import local_proxy
from xaiproxy.login.finding import Finding, failure, ok, skipped, warning
from xaiproxy.login.local_proxy import OTHER_SETTINGS, Listener
from xaiproxy.login.wording import duration, local_time, printable
from xaiproxy.oauth import discovery
from xaiproxy.oauth.session import Answer, Session, parse_date

DEADLINE = 10.0  # seconds for each request to the issuer and the API, of which there are up to four
# Seconds; half of XAI_PROXY_REFRESH_SKEW, so that a token is still renewed in time.
CLOCK_TOLERANCE = 60


class ClockSession(Session):
    """A session that compares our clock with the servers' (RFC 9110 section 6.6.1).

    `ahead`: seconds that ours is ahead, by host.
    """

    def __init__(
        self,
        settings: config.Config,
        now: Callable[[], float],
        address_from: str = "XAI_PROXY_ISSUER",
    ):
        super().__init__(settings, now, address_from)
        self.ahead: dict[str, float] = {}

    def get(self, url: str, deadline: float = DEADLINE, headers: Mapping[str, str] = {}) -> Answer:
        answer = super().get(url, deadline, headers)
        date, age = parse_date(answer.headers.get("Date", "")), answer.headers.get("Age", "")
        if date is not None:
            # The Date of a cached response is that of its creation.
            cached = int(age) if re.fullmatch("[0-9]{1,9}", age) else 0
            self.ahead[urllib.parse.urlsplit(url).netloc] = self._now() - date - cached
        return answer


def routes(settings: config.Config) -> Finding:
    egress = settings.egress

    def route(url: str) -> str:
        host, proxy = urllib.parse.urlsplit(url), egress.proxy_for(url)
        if proxy is None:
            loopback = " (loopback)" if addresses.is_loopback(host.hostname) else ""
            exempt = " (NO_PROXY)" if egress.proxy else ""
            return f"{host.netloc} directly{loopback or exempt}"
        parts = urllib.parse.urlsplit(proxy)
        # The user part is a password.
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        return f"{host.netloc} through {address} ({egress.proxy_from})"

    both = " and ".join(dict.fromkeys(map(route, (settings.issuer, settings.upstream))))
    return ok(
        f"{both}; CA certificates of {egress.ca_file} ({egress.ca_from or 'certifi, the default'})"
    )


def issuer(session: Session, url: str) -> Finding:
    try:
        discovery.discover(session, url, deadline=DEADLINE)
    except errors.IssuerUnavailable as error:
        return failure(error.exit_code, str(error))
    return ok(f"{url} answers; discovery document valid")


def refresher(settings: config.Config) -> Finding:
    """The refresher on another machine."""
    url = settings.refresher
    direct = dataclasses.replace(settings, egress=settings.egress.direct())
    try:
        answer = Session(direct, address_from="XAI_PROXY_REFRESHER").get(f"{url}/readyz", DEADLINE)
    except errors.IssuerUnavailable as error:
        return warning(f"it cannot be asked for another access token: {error}")
    reason = (answer.json() or {}).get("reason")
    if not isinstance(reason, str):
        return warning(
            f"{url} does not answer as a refresher does ({answer.summary}); correct "
            "XAI_PROXY_REFRESHER"
        )
    if answer.status != 200:
        return warning(f"on another machine: {url} answers, but not ready: {printable(reason)}")
    return ok(f"on another machine: {url} answers, and ready: {printable(reason)}")


def clock(ahead: dict[str, float], now: float) -> Finding:
    """`ahead`: seconds that our clock is ahead, by host. One host that agrees is enough."""
    if not ahead:
        return skipped(f"no server answered to compare it with; it is {local_time(now)} here")
    host, seconds = min(ahead.items(), key=lambda item: abs(item[1]))
    if abs(seconds) <= CLOCK_TOLERANCE:
        return ok(f"it agrees with that of {host}")
    return warning(
        f"it is {duration(abs(seconds))} {'ahead of' if seconds > 0 else 'behind'} that of {host}, "
        "so tokens are wrongly taken for valid or expired; set it (timedatectl set-ntp true)"
    )


def proxy(settings: config.Config, verdict: Judgement) -> Finding:
    """`verdict`: of the login that a proxy with these settings would have."""
    if not settings.has_known_address:
        return skipped("XAI_PROXY_PORT is 0: the proxy listens on any free port, and logs which")
    found = local_proxy.find(settings)
    url = found.url
    if found.kind is Listener.OTHER:
        return failure(
            errors.EXIT_CONFIGURATION,
            f"another program listens on {url}; stop that, or set {found.setting}",
        )
    if found.kind is Listener.NOTHING:
        return warning(
            f"not running: nothing is listening on {url}; "
            f"start {errors.SERVE}, or {errors.typed('xai-proxy')} alone"
        )
    if found.kind is Listener.SILENT:
        return failure(
            errors.EXIT_UNAVAILABLE,
            f"{url} does not answer as the proxy does ({found.reason}); check its log, or set "
            f"{found.setting} if it is another program",
        )
    other = f"; it {OTHER_SETTINGS}"
    if found.has_other_settings(verdict):
        return warning(f"serving {found.api}, and ready: {found.reason}{other}")
    if found.ready:
        return ok(f"serving {found.api}, and ready: {found.reason}")
    if not verdict.ready or "client key" in found.reason:
        other = ""
    return failure(
        errors.EXIT_TRY_AGAIN, f"serving {found.api}, but not ready: {found.reason}{other}"
    )
