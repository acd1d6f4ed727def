"""xai-login --doctor: find out why the login or the proxy does not work, and what to do.

It changes nothing: it refreshes, writes and locks nothing, and does not even import the code for
that (tests/test_imports.py). The access token is sent only where the proxy would send it, and only
while it is valid. Each check is a function that returns or yields findings. `checks` lists them in
order, and `examine` runs each and prints its findings at once. They are in doctor_api,
doctor_files and doctor_network.
"""

import resource
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from xaiproxy import config, errors, judgement, token_store, tokens
from xaiproxy.login import doctor_api as api
from xaiproxy.login import doctor_files as files
from xaiproxy.login import doctor_network as network
from xaiproxy.login.finding import LABELS, Finding, failure, skipped
from xaiproxy.login.output import Output
from xaiproxy.login.wording import count

EGRESS = {"HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
LOGIN = {"XAI_PROXY_TOKEN_PATH", "XAI_PROXY_ISSUER", "XAI_PROXY_CLIENT_ID", "XAI_PROXY_UPSTREAM"}
KEYS = {
    "XAI_PROXY_CLIENT_KEYS_FILE",
    "XAI_PROXY_TOKEN_PATH",
    "XAI_PROXY_BIND",
    "XAI_PROXY_ALLOW_ANONYMOUS",
}


class Check(NamedTuple):
    """`depends_on`: settings without which its findings would mislead."""

    name: str
    depends_on: set[str]
    run: Callable[[], Iterable[Finding]]


def examine(
    environ: Mapping[str, str],
    options: Mapping[str, str | None],
    out: Output,
    now: Callable[[], float] = time.time,
    pause: Callable[[float], object] = time.sleep,
) -> int:
    """Print each finding as it is made. Return the exit code of the first failure, or 0."""
    results = []
    exit_code = 0
    for check, finding in findings(environ, options, out, now, pause):
        results.append(finding.result)
        exit_code = exit_code or finding.exit_code
        out.event(
            "check",
            f"{LABELS[finding.result]:8} {check}: {finding.message}",
            check=check,
            result=finding.result,
            message=finding.message,
            **({"exit_code": finding.exit_code} if finding.exit_code else {}),
        )
    failures, warnings = results.count("failure"), results.count("warning")
    text = "No problem found."
    if failures:
        text = (
            f"{count(failures, 'failure')}, {count(warnings, 'warning')}; "
            "start with the first failure."
        )
    elif warnings:
        text = f"No failure, {count(warnings, 'warning')}."
    out.event("doctor", text, failures=failures, warnings=warnings, exit_code=exit_code)
    return exit_code


def findings(
    environ: Mapping[str, str],
    options: Mapping[str, str | None],
    out: Output,
    now: Callable[[], float],
    pause: Callable[[float], object],
) -> Iterator[tuple[str, Finding]]:
    """Each finding with the name of its check, as soon as it is made."""
    wrong: list[errors.ConfigurationError] = []
    settings = None
    try:
        settings = config.from_environ(environ, options, complain=wrong.append)
    except errors.ConfigurationError as error:
        wrong.append(error)
    for problem in wrong:
        yield "settings", failure(problem.exit_code, str(problem))
    if settings is None:
        return
    if not wrong:
        for finding in files.in_force(settings):
            yield "settings", finding
    for check in checks(settings, now, pause):
        out.progress(f"{'...':8} {check.name}")
        for finding in _doubts(check, wrong) or check.run():
            yield check.name, finding
            out.progress(f"{'...':8} {check.name}")


def _doubts(check: Check, wrong: list[errors.ConfigurationError]) -> list[Finding]:
    """One skipped finding, if the check depends on a wrong setting."""
    for error in wrong:
        if check.depends_on and error.setting in check.depends_on | {None}:
            return [skipped(f"it depends on {error.setting or 'the settings'}, see above")]
    return []


def checks(
    settings: config.Config, now: Callable[[], float], pause: Callable[[float], object]
) -> Iterator[Check]:
    store = token_store.TokenStore(settings)
    issuer_session = network.ClockSession(settings, now)
    api_session = network.ClockSession(settings, now, "XAI_PROXY_UPSTREAM")
    login: tokens.Login | None = None
    mode, unusable = 0, []
    try:
        login, mode = store.load(), stat.S_IMODE(store.read()[1].st_mode)
    except errors.LoginUnusable as error:
        unusable = [files.unusable_login(error)]
    # Whether a refresher on another machine renews the login.
    remote = login is not None and login.refresh_token is None and settings.refresher
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def is_valid() -> bool:
        return login is not None and login.expires_at > now()

    yield Check(
        "network",
        EGRESS | {"XAI_PROXY_ISSUER", "XAI_PROXY_UPSTREAM"},
        lambda: [network.routes(settings)],
    )
    yield Check(
        "login", LOGIN, lambda: files.of_login(store, login, mode, now()) if login else unusable
    )
    yield Check("token folder", {"XAI_PROXY_TOKEN_PATH"}, lambda: files.token_folder(store, login))
    yield Check(
        "refresher",
        {"XAI_PROXY_TOKEN_PATH", "XAI_PROXY_REFRESHER"},
        lambda: [network.refresher(settings)] if remote else files.refresher(store, login, now()),
    )
    yield Check(
        "issuer",
        EGRESS | {"XAI_PROXY_ISSUER"},
        lambda: [
            skipped("not needed here: the refresher on another machine renews the login")
            if remote
            else network.issuer(issuer_session, settings.issuer)
        ],
    )
    yield Check(
        "upstream",
        EGRESS | LOGIN,
        lambda: api.upstream(api_session, store, login if is_valid() else None, pause),
    )
    yield Check(
        "clock", set(), lambda: [network.clock(issuer_session.ahead | api_session.ahead, now())]
    )
    yield Check(
        "file descriptors",
        {"XAI_PROXY_MAX_CONNECTIONS"},
        lambda: [files.descriptors(settings.max_connections, descriptors)],
    )
    yield Check("client keys", KEYS, lambda: [files.keys(settings)])
    yield Check(
        "proxy",
        {"XAI_PROXY_BIND", "XAI_PROXY_PORT"},
        lambda: [network.proxy(settings, judgement.of(store, now()))],
    )
