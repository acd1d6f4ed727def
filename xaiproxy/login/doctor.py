"""xai-login --doctor: find out why the login or the proxy does not work, and what to do.

It changes nothing: it refreshes, writes and locks nothing, and does not even import the code for
that (tests/test_imports.py). The access token is sent only where the proxy would send it, and only
while it is valid. Each check is a function that returns or yields findings. `checks` lists them in
order, and `examine` runs each and prints its findings at once. They are in doctor_files and
doctor_network.
"""

import resource
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from xaiproxy import config, errors, token_store, tokens
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
    login: tokens.Tokens | None = None
    mode, unusable = 0, []
    try:
        login, mode = store.load(), stat.S_IMODE(store.read()[1].st_mode)
    except errors.LoginUnusable as error:
        unusable = [files.unusable_login(error)]
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
    yield Check("refresher", {"XAI_PROXY_TOKEN_PATH"}, lambda: files.refresher(store, login, now()))
    yield Check(
        "issuer",
        EGRESS | {"XAI_PROXY_ISSUER"},
        lambda: [network.issuer(issuer_session, settings.issuer)],
    )
    yield Check(
        "upstream",
        EGRESS | LOGIN,
        lambda: network.upstream(api_session, store, login if is_valid() else None, pause),
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
        lambda: [network.proxy(settings, is_valid())],
    )


# The files


def in_force(settings: config.Config) -> Iterator[Finding]:
    yield ok(f"the login of {settings.issuer} in {settings.token_path}, for {settings.upstream}")
    for text in settings.warnings:
        yield warning(text)


def unusable_login(error: errors.LoginUnusable) -> Finding:
    codes = {
        "foreign": errors.EXIT_CONFIGURATION,
        "not_ours": errors.EXIT_TRY_AGAIN,
        "unreadable": errors.EXIT_TRY_AGAIN,
    }  # as signing in ends for the same reasons
    return failure(codes.get(error.state, error.exit_code), str(error))


def login_of(
    store: token_store.TokenStore, login: tokens.Tokens, mode: int, now: float
) -> Iterator[Finding]:
    yield lifetime(login, store, now)
    if login.refresh_token is not None and mode & 0o077:
        yield warning(
            f"{store.path} is open to other users (mode {mode:04o}); chmod 600 it, as the refresher does"
        )


def lifetime(login: tokens.Tokens, store: token_store.TokenStore, now: float) -> Finding:
    verdict = judgement.of(store, now, lambda: login)
    # A token that the API refuses is not called valid.
    standing = (
        validity(login, now) if verdict.ready or login.expires_at <= now else verdict.sentence
    )
    said = " ".join(
        [
            f"that of {who(login)} in {store.path}. {standing}",
            *(last_failure(login) or judgement.reported_failure(store, login, now)),
        ]
    )
    if login.refresh_token is None:
        said += " " + outlook(login, False, now)
    if verdict.verdict is Verdict.NO_REFRESHER:  # which the next check tells
        return (
            ok(said) if verdict.ready else warning(f"{said} It is renewed once the refresher runs.")
        )
    if verdict.verdict is Verdict.GOOD:
        return ok(said)
    if verdict.exit_code == 0:
        return warning(said)
    if login.refresh_token is None:
        said += f" Replace the file, or {errors.SIGN_IN}."
    if verdict.exit_code == errors.EXIT_TRY_AGAIN:
        said += " The refresher is there to renew it: try again in a minute, and then look into its log."
    return failure(verdict.exit_code, said)


def token_folder(store: token_store.TokenStore, login: tokens.Tokens | None) -> Iterator[Finding]:
    folder, user = store.path.parent, os.geteuid()
    try:
        risk, disk = storage.risk_of(os.stat(folder)), os.statvfs(folder)
    except FileNotFoundError:
        yield skipped(f"{folder} does not exist; signing in makes it")
        return
    except OSError as error:
        yield failure(
            errors.EXIT_TRY_AGAIN,
            f"{folder} cannot be looked at ({error.strerror}); give user {user} leave",
        )
        return
    try:
        storage.check_owner(store.path)
    except errors.StorageError as error:
        yield failure(error.exit_code, str(error))
        return
    if risk:
        yield warning(f"{folder} {risk}")
    if login is not None and login.refresh_token is None:
        return  # a mounted Secret: nobody writes there
    why = ""
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        why = f"user {user} cannot write in {folder}; give that user leave, or mount it writable"
    elif os.path.ismount(store.path):
        why = f"{store.path} is a mount of its own and cannot be replaced; mount {folder} instead"
    elif disk.f_blocks and disk.f_bavail * disk.f_frsize < ROOM:
        why = f"the disk of {folder} is full; make room on it"
    yield (
        failure(errors.EXIT_TRY_AGAIN, f"no renewed login can be saved: {why}")
        if why
        else ok(f"{folder} can be written, and there is room")
    )


def refresher(
    store: token_store.TokenStore, login: tokens.Tokens | None, now: float
) -> Iterator[Finding]:
    lock, age, user = store.lock_path, store.refresher_age(now), os.geteuid()
    if os.path.lexists(lock):  # else it is made when it is needed
        if os.path.islink(lock) or not os.path.isfile(lock):
            yield failure(
                errors.EXIT_TRY_AGAIN, f"{lock} is not a file that could be locked; remove it"
            )
        elif not os.access(lock, os.R_OK | os.W_OK, effective_ids=True):
            yield failure(
                errors.EXIT_TRY_AGAIN,
                f"{lock} is closed to user {user}, who can so neither sign in nor "
                "refresh; chown it to that user, or run as its owner",
            )
    if login is not None and login.refresh_token is None:
        yield skipped("the login has no refresh token, and so nothing to renew it with")
    elif store.refresher_alive(now):
        yield ok(f"it runs: its last sign of life was {abs(age):.0f} s ago")
    else:
        last = (
            "there was never a sign of life"
            if age is None
            else f"the last sign of life was {local_time(now - age)}"
        )
        yield warning(
            f"it does not run ({last}), and nobody else renews the login; {START.format(errors.typed('xai-refresher'))}"
        )


def keys(settings: config.Config) -> Finding:
    path, make = settings.client_keys_file, errors.typed("xai-client-key add NAME")
    try:
        known = client_keys.load(path)
    except FileNotFoundError:
        known = None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return failure(
            errors.EXIT_CONFIGURATION,
            f"{path} cannot be used ({reason}), so that nobody is admitted; "
            "put it right or remove it",
        )
    if known is not None:
        if not known:
            return failure(
                errors.EXIT_CONFIGURATION,
                f"{path} holds no key, so that nobody is admitted; {make}, or remove "
                "it and restart the proxy, which then asks for none",
            )
        return ok(f"each call needs one; {path} holds {len(known)}")
    if path != settings.token_path.parent / "client-keys":
        return failure(
            errors.EXIT_CONFIGURATION, f"{path} does not exist, so that nobody is admitted; {make}"
        )
    if config.is_loopback(settings.bind):
        return ok("none is asked for: every program on this machine may call")
    if settings.allow_anonymous:
        return warning(
            f"none is asked for: everybody who reaches {settings.bind} spends your quota; {make}"
        )
    return failure(
        errors.EXIT_CONFIGURATION,
        f"there is none, and without one the proxy does not start on "
        f"{settings.bind}; {make}, or set XAI_PROXY_ALLOW_ANONYMOUS=1",
    )


def descriptors(connections: int, limit: int) -> Finding:
    """`limit`: the hard one, up to which the proxy raises its own."""
    if limit == resource.RLIM_INFINITY or limit >= config.descriptors_for(connections):
        return ok(f"enough for {connections} client connections")
    more = f"; supervisord needs {SUPERVISOR_DESCRIPTORS}" if limit < SUPERVISOR_DESCRIPTORS else ""
    return warning(
        f"the limit of {limit} has room for {config.connections_within(limit)} client connections, not "
        f"{connections}{more}; raise it (ulimit -Hn, or LimitNOFILE= of a systemd unit), or lower "
        "XAI_PROXY_MAX_CONNECTIONS"
    )


# The network


class WatchedSession(Session):
    """Notes by how many seconds our clock is ahead of those of the hosts that answer (RFC 9110 section 6.6.1)."""

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
        if date is not None:  # what a cache kept is dated when it was made
            old = int(age) if re.fullmatch("[0-9]{1,9}", age) else 0
            self.ahead[urllib.parse.urlsplit(url).netloc] = self._now() - date - old
        return answer


def network(settings: config.Config) -> Finding:
    egress = settings.egress

    def way(url: str) -> str:
        host, through = urllib.parse.urlsplit(url), egress.proxy_for(url)
        if through is None:
            why = (
                " (loopback)"
                if config.is_loopback(host.hostname)
                else " (NO_PROXY)"
                if egress.proxy
                else ""
            )
            return f"{host.netloc} directly{why}"
        parts = urllib.parse.urlsplit(through)  # without its user part
        return f"{host.netloc} through {parts.scheme}://{parts.netloc.rpartition('@')[2]} ({egress.proxy_from})"

    ways = " and ".join(dict.fromkeys(map(way, (settings.issuer, settings.upstream))))
    return ok(
        f"{ways}; CA certificates of {egress.ca_file} ({egress.ca_from or 'certifi, the default'})"
    )


def issuer(web: Session, url: str) -> Finding:
    try:
        discovery.discover(web, url, deadline=DEADLINE)
    except errors.IssuerUnavailable as error:
        return failure(error.exit_code, str(error))
    return ok(f"{url} answers and describes itself rightly")


def upstream(
    web: Session,
    store: token_store.TokenStore,
    login: tokens.Tokens | None,
    now: Callable[[], float],
    pause: Callable[[float], object],
) -> Iterator[Finding]:
    url = store.settings.upstream
    usable = login is not None and login.expires_at > now()
    try:
        answer = web.get(url + "/v1/me", DEADLINE, bearer(login) if usable else {})
        if usable and is_refused(answer):
            # As the proxy does: a token may be refused when it is brand-new, or be renewed by now.
            pause(1)
            login = reloaded(store, login)
            answer = web.get(url + "/v1/me", DEADLINE, bearer(login))
        if not usable:
            yield without_token(url, answer)
            return
        yield of_account(f"{url}/v1/me", answer)
        if not is_refused(answer):
            yield of_models(
                f"{url}/v1/models", web.get(url + "/v1/models", DEADLINE, bearer(login))
            )
    except errors.IssuerUnavailable as error:
        yield failure(error.exit_code, str(error))


def bearer(login: tokens.Tokens) -> dict[str, str]:
    return {"Authorization": f"Bearer {login.access_token}"}


def reloaded(store: token_store.TokenStore, login: tokens.Tokens) -> tokens.Tokens:
    try:
        return store.load()
    except errors.LoginUnusable:
        return login


def is_refused(answer: Answer) -> bool:
    return answer.status == 401 or (answer.status == 403 and tokens.is_refusal(answer.body))


def without_token(url: str, answer: Answer) -> Finding:
    if answer.status in (200, 401, 403) and answer.json() is not None:
        return ok(f"{url} answers; no token was tried, as there is none that is valid")
    return trouble(f"{url}/v1/me", answer)


def of_account(url: str, answer: Answer) -> Finding:
    about = answer.json() if answer.status == 200 else None
    if about is None:
        return trouble(url, answer)
    if about.get("team_blocked") is True:
        return failure(
            errors.EXIT_SIGN_IN,
            f"{url} takes the token, but says that the account is blocked; look at "
            "https://console.x.ai, since signing in again does not help",
        )
    return ok(f"{url} takes the token")


def of_models(url: str, answer: Answer) -> Finding:
    models = (answer.json() or {}).get("data") if answer.status == 200 else None
    if not isinstance(models, list):
        return trouble(url, answer)
    if not models:
        return warning(
            f"{url} lists no model, as for some accounts that can use them all the same; name the model in "
            "the client yourself"
        )
    return ok(f"{url} lists {len(models)} model{'s' * (len(models) != 1)}")


def trouble(url: str, answer: Answer) -> Finding:
    """What an answer that nobody wants says of the login, the account or the network."""
    code = (answer.json() or {}).get("code")
    code = f", {code}" if isinstance(code, str) and re.fullmatch(r"[a-z0-9:_-]{1,60}", code) else ""
    said = f"{url} answered HTTP {answer.status}{code}"
    if answer.status == 429:
        when = "later" if answer.retry_after is None else f"in {duration(answer.retry_after)}"
        return failure(
            errors.EXIT_TRY_AGAIN,
            f"{said}: too many requests, or the account's quota is used up; try again {when}",
        )
    if answer.status >= 500:
        return failure(
            errors.EXIT_UNAVAILABLE,
            f"{said}: the API is in trouble; try again later (https://status.x.ai)",
        )
    if answer.is_html or b"error code:" in answer.body[:200]:
        return failure(
            errors.EXIT_UNAVAILABLE,
            f"{said}, and a page: Cloudflare, or a proxy of your network, does not "
            "let this machine through; try another network, or set HTTPS_PROXY",
        )
    if is_refused(answer):
        return failure(
            errors.EXIT_SIGN_IN,
            f"{said}: it refuses the access token, though that has not expired; unless "
            f"a request through the proxy has it renewed, {errors.SIGN_IN}",
        )
    if answer.status in (402, 403):
        return failure(
            errors.EXIT_SIGN_IN,
            f"{said}: the login is good, but the account's plan or credit does not "
            "allow it; look at https://grok.com, since signing in again does not help",
        )
    return failure(
        errors.EXIT_UNAVAILABLE, f"{said}, which is no answer of the API; check XAI_PROXY_UPSTREAM"
    )


def clock(ahead: dict[str, float], now: float) -> Finding:
    """`ahead`: by how many seconds ours is ahead of each host's. One that agrees is enough."""
    if not ahead:
        return skipped(f"nobody answered to compare it with; here it is {local_time(now)}")
    host, seconds = min(ahead.items(), key=lambda item: abs(item[1]))
    if abs(seconds) <= CLOCK_BOUND:
        return ok(f"it agrees with that of {host}")
    return warning(
        f"it is {duration(abs(seconds))} {'ahead of' if seconds > 0 else 'behind'} that of {host}, so that "
        "tokens are taken for valid or expired wrongly; set it (timedatectl set-ntp true)"
    )


def proxy(settings: config.Config, signed_in: bool) -> Finding:
    """`signed_in`: whether a proxy with these settings would have a valid token."""
    web = Session(settings, address_from="XAI_PROXY_BIND")
    if settings.port == 0:
        return skipped("XAI_PROXY_PORT is 0: it takes any free port, and its log says which")
    address = ipaddress.ip_address(settings.bind)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    url = f"http://{f'[{address}]' if address.version == 6 else address}:{settings.port}"
    try:
        if web.get(url + "/healthz", LOCAL_DEADLINE).json() != {"status": "ok"}:
            return failure(
                errors.EXIT_CONFIGURATION,
                f"what listens on {url} is another program; stop that, or set XAI_PROXY_PORT",
            )
        ready = web.get(url + "/readyz", LOCAL_DEADLINE)
    except errors.IssuerUnavailable as error:
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes_of(error)):
            return warning(
                f"it does not run: nobody listens on {url}; {START.format(errors.typed('xai-proxy'))}"
            )
        return failure(
            error.exit_code,
            f"{url} does not answer as the proxy does ({error}); look into its log, or set "
            "XAI_PROXY_PORT if it is another program",
        )
    reason = printable(str((ready.json() or {}).get("reason")))
    if ready.status == 200:
        return ok(f"{url}/v1 is served, and ready: {reason}")
    about_keys = "client key" in reason
    other = (
        "; it seems to run with other settings than these" if signed_in and not about_keys else ""
    )
    return failure(errors.EXIT_TRY_AGAIN, f"{url}/v1 is served, but not ready: {reason}{other}")
