"""The summary of --status for a person: a headline, then a label and lines for each part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from xaiproxy import errors, judgement, tokens
from xaiproxy.judgement import Verdict
from xaiproxy.login.local_proxy import OTHER_SETTINGS, Listener
from xaiproxy.login.summary import Summary
from xaiproxy.login.wording import account_name, duration, last_failure, local_time, printable
from xaiproxy.quota import Quota
from xaiproxy.style import DIM, GREEN, RED, YELLOW, Style

INDENT = 12  # columns of the labels
# Used shares of the pool, in %, from which its bar is yellow and red.
SCARCE, NEARLY_USED = 80, 95


class Row(NamedTuple):
    label: str
    texts: list[str]
    bar: str = ""


def lines(summary: Summary, style: Style, copyable: bool = True) -> list[str]:
    """Return the summary as lines of the terminal, or as lines of any length.

    `copyable`: whether a command or a path stays one line, which only the terminal wraps.
    """

    def wrap(text: str, indent: int) -> list[str]:
        unbroken = copyable and ("`" in text or " " not in text)
        return style.wrap(printable(text), indent, unbroken)

    headline = summary.headline[0].upper() + summary.headline[1:]
    shown = [style.paint(_colour(summary), line) for line in wrap(headline, 0)]
    for row in _rows(summary, style):
        beside = [line for text in row.texts for line in wrap(text, INDENT)]
        if row.bar:
            beside.insert(0, row.bar)
        labels = [style.paint(DIM, row.label.ljust(INDENT)), *[" " * INDENT] * len(beside)]
        shown += [label + line for label, line in zip(labels, beside, strict=False)]
    return shown


def _colour(summary: Summary) -> str:
    verdict = summary.verdict
    if not verdict.ready or verdict.exit_code:
        return RED
    proxy = summary.proxy
    good = proxy is None or (
        proxy.ready and not proxy.warning and not proxy.has_other_settings(verdict)
    )
    return GREEN if good and verdict.verdict is Verdict.GOOD else YELLOW


def _rows(summary: Summary, style: Style) -> Iterator[Row]:
    if isinstance(summary.login, tokens.Login):
        login = summary.login
        yield Row("Account", [f"{account_name(login)} at {login.issuer}"])
        yield Row("Token", list(_token(summary, login)), _lifetime(summary, login, style))
        yield Row("Refresher", list(_refresher(summary, login)))
        if summary.store.settings.publish is not None:
            yield Row("Published", [_published(summary)])
    if summary.quota or summary.quota_error:
        yield _quota(summary, style)
    yield Row("Proxy", [_proxy(summary)])
    yield Row("Token file", [str(summary.store.path)])


def _token(summary: Summary, login: tokens.Login) -> Iterator[str]:
    left, end = login.expires_at - summary.at, local_time(login.expires_at)
    if left <= 0:
        yield f"expired at {end}, {duration(-left)} ago"
    elif summary.verdict.ready:
        yield f"valid until {end}, for another {duration(left)}"
    else:
        yield f"refused by the API, though it would expire only at {end}"
    issued, due = login.issued_at(), summary.next_refresh_at
    times = [f"obtained at {local_time(issued)}"] if issued is not None else []
    if due is not None:
        times.append(f"next renewal at {local_time(due)}" if due > summary.at else "renewal is due")
    if times:
        yield ", ".join(times)


def _lifetime(summary: Summary, login: tokens.Login, style: Style) -> str:
    """The token's lifetime as a bar: what has passed of it, and a mark at the next renewal."""
    begin, lifetime, due = login.issued_at(), login.lifetime(), summary.next_refresh_at
    if begin is None or lifetime is None:
        return ""
    mark = None if due is None else (due - begin) / lifetime
    return style.bar((summary.at - begin) / lifetime, _colour(summary), INDENT, mark)


def _refresher(summary: Summary, login: tokens.Login) -> Iterator[str]:
    seen = summary.refresher_seen_at
    if login.refresh_token is None and (url := summary.store.settings.refresher):
        yield f"on another machine: {url} is asked when the API refuses the access token"
        return
    if login.refresh_token is None:
        yield "not needed: the token file holds no refresh token, so the login cannot be renewed"
        return
    if summary.refresher_alive and seen is not None:
        yield f"running, last heartbeat {duration(abs(summary.at - seen))} ago"
    else:
        verb = "lapses" if login.expires_at > summary.at else "lapsed"
        yield f"not running: the login {verb} at {local_time(login.expires_at)}"
        yield "no heartbeat so far" if seen is None else f"last heartbeat at {local_time(seen)}"
    failure = login.refresh_error
    # The headline has what to do about a terminal failure.
    known = last_failure(login)[: 1 if failure and failure.terminal else None]
    failures = known or judgement.reported_failure(summary.store, login, summary.at)
    if summary.refresher is not None and summary.refresher.result == "ok" and not failures:
        yield "the last renewal succeeded"
    yield from failures


def _published(summary: Summary) -> str:
    status = summary.refresher
    if status is None:
        return "unknown: the refresher has no status for this login"
    at, failure = status.published_at, status.publish_failure
    if at is None:
        return f"not yet: {failure}" if failure else "not yet"
    return f"at {local_time(at)}" + (f"; since then: {failure}" if failure else "")


def _quota(summary: Summary, style: Style) -> Row:
    quota, error = summary.quota, summary.quota_error
    texts = [str(error)] if error else []
    if quota is None:
        return Row("Quota", texts)
    level = GREEN if quota.used_percent < SCARCE else YELLOW
    level = level if quota.used_percent < NEARLY_USED else RED
    bar = style.bar(quota.used_percent / 100, level, INDENT)
    return Row("Quota", [*_used(quota, summary.at), *texts], bar)


def _used(quota: Quota, now: float) -> Iterator[str]:
    pool = f"the {quota.period} pool" if quota.period else "the pool"
    age = now - quota.asked_at
    asked = f"asked {duration(age)} ago" if age >= 60 else "asked just now"
    yield f"{quota.used_percent:g} % of {pool} used, {asked}"
    if quota.resets_at is not None:
        end, left = local_time(quota.resets_at), quota.resets_at - now
        yield f"resets at {end}, in {duration(left)}" if left > 0 else f"was reset at {end}"
    extras = [f"plan {quota.tier}"] if quota.tier else []
    if quota.prepaid_cents:
        extras.append(f"prepaid balance ${quota.prepaid_cents / 100:.2f}")
    if extras:
        yield ", ".join(extras)


def _proxy(summary: Summary) -> str:
    proxy = summary.proxy
    if proxy is None:
        return "not asked: XAI_PROXY_PORT is 0, so it listens on any free port"
    if proxy.kind is Listener.NOTHING:
        return f"not running: nothing is listening on {proxy.url}; start {errors.SERVE}"
    if proxy.kind is Listener.OTHER:
        return f"not running: another program listens on {proxy.url}"
    if proxy.kind is Listener.SILENT:
        return f"does not answer at {proxy.url}: {proxy.reason}"
    if proxy.ready:
        other = proxy.has_other_settings(summary.verdict)
        return f"serving {proxy.api}" + (f", but it {OTHER_SETTINGS}" if other else "")
    # The headline may have the same reason.
    same = proxy.reason == summary.verdict.reason
    return f"running at {proxy.url}, but not ready" + ("" if same else f": {proxy.reason}")
