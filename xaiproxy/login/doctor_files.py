"""Checks of --doctor on this machine: settings, login, token folder, refresher, keys, limits."""

import os
import resource
from collections.abc import Iterator

from xaiproxy import addresses, client_keys, config, errors, judgement, storage, token_store, tokens
from xaiproxy.judgement import Verdict
from xaiproxy.login.finding import Finding, failure, ok, skipped, warning
from xaiproxy.login.wording import account_name, last_failure, local_time, outlook, validity

ROOM = 65536  # bytes of token_writer.RESERVE, written before a refresh token is spent
SUPERVISOR_DESCRIPTORS = 1024  # supervisord's minfds; with fewer it does not start


def in_force(settings: config.Config) -> Iterator[Finding]:
    yield ok(f"the login of {settings.issuer} in {settings.token_path}, for {settings.upstream}")
    for text in settings.warnings:
        yield warning(text)


def unusable_login(error: errors.LoginUnusable) -> Finding:
    # The exit codes with which signing in ends for the same reasons.
    codes = {
        "foreign": errors.EXIT_CONFIGURATION,
        "not_ours": errors.EXIT_TRY_AGAIN,
        "unreadable": errors.EXIT_TRY_AGAIN,
    }
    return failure(codes.get(error.state, error.exit_code), str(error))


def of_login(
    store: token_store.TokenStore, login: tokens.Login, mode: int, now: float
) -> Iterator[Finding]:
    yield lifetime(login, store, now)
    if login.refresh_token is not None and mode & 0o077:
        yield warning(
            f"{store.path} is open to other users (mode {mode:04o}); chmod 600 it, as the "
            "refresher does"
        )


def lifetime(login: tokens.Login, store: token_store.TokenStore, now: float) -> Finding:
    verdict = judgement.of(store, now, lambda: login)
    # A token that the API refuses is not called valid.
    expired = login.expires_at <= now
    sentences = [
        f"signed in as {account_name(login)}, in {store.path}.",
        validity(login, now) if verdict.ready or expired else verdict.sentence,
        *(last_failure(login) or judgement.reported_failure(store, login, now)),
    ]
    remote = login.refresh_token is None and store.settings.refresher
    if login.refresh_token is None and not remote:
        sentences.append(outlook(login, False, now))
    # A refresher that does not run is a finding of the next check.
    if verdict.verdict is Verdict.NO_REFRESHER and not verdict.ready:
        sentences.append("It is renewed once the refresher runs.")
        return warning(" ".join(sentences))
    if verdict.verdict in (Verdict.GOOD, Verdict.NO_REFRESHER):
        return ok(" ".join(sentences))
    if verdict.exit_code == 0:
        return warning(" ".join(sentences))
    if login.refresh_token is None and not remote:
        sentences.append(f"Replace the file, or {errors.SIGN_IN}.")
    elif verdict.exit_code == errors.EXIT_TRY_AGAIN:
        sentences.append(
            "The refresher on another machine should renew it: try again in two minutes, then "
            "check its log, and what brings the token file here."
            if remote
            else "The refresher is running and should renew it: try again in a minute, then check "
            "its log."
        )
    return failure(verdict.exit_code, " ".join(sentences))


def token_folder(store: token_store.TokenStore, login: tokens.Login | None) -> Iterator[Finding]:
    folder, user = store.path.parent, os.geteuid()
    try:
        risk, disk = storage.risk_of(os.stat(folder)), os.statvfs(folder)
        storage.check_owner(store.path)
    except FileNotFoundError:
        above = next(filter(os.path.exists, folder.parents))
        yield (
            skipped(f"{folder} does not exist; signing in creates it")
            if os.access(above, os.W_OK | os.X_OK, effective_ids=True)
            else failure(
                errors.EXIT_TRY_AGAIN,
                f"{folder} does not exist, and user {user} cannot write in {above} to create it; "
                "give it permission, or mount it writable",
            )
        )
        return
    except OSError as error:
        yield failure(
            errors.EXIT_TRY_AGAIN,
            f"{folder} cannot be accessed ({error.strerror}); give user {user} permission",
        )
        return
    except errors.StorageError as error:
        yield failure(error.exit_code, str(error))
        return
    if risk:
        yield warning(f"{folder} {risk}")
    # Nothing is written beside a login without a refresh token, such as a mounted Secret.
    if login is not None and login.refresh_token is None:
        return
    why = ""
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        why = f"user {user} cannot write in {folder}; give it permission, or mount it writable"
    elif os.path.ismount(store.path):
        why = f"{store.path} is a mount of its own and cannot be replaced; mount {folder} instead"
    elif disk.f_blocks and disk.f_bavail * disk.f_frsize < ROOM:
        why = f"the disk of {folder} is full; make room on it"
    yield (
        failure(errors.EXIT_TRY_AGAIN, f"no renewed login can be saved: {why}")
        if why
        else ok(f"{folder} is writable, and its disk has room")
    )


def refresher(
    store: token_store.TokenStore, login: tokens.Login | None, now: float
) -> Iterator[Finding]:
    lock, age, user = store.lock_path, store.refresher_age(now), os.geteuid()
    # A lock file that does not exist is created when it is needed.
    if os.path.lexists(lock):
        if os.path.islink(lock) or not os.path.isfile(lock):
            yield failure(
                errors.EXIT_TRY_AGAIN,
                f"{lock} is not a regular file and cannot be locked; remove it",
            )
        elif not os.access(lock, os.R_OK | os.W_OK, effective_ids=True):
            yield failure(
                errors.EXIT_TRY_AGAIN,
                f"{lock} is closed to user {user}, so that user can neither sign in nor refresh; "
                "chown it to that user, or run as its owner",
            )
    if login is not None and login.refresh_token is None:
        yield skipped("the login has no refresh token, so it cannot be renewed")
    elif age is not None and store.refresher_alive(now):
        yield ok(f"running; its last heartbeat was {abs(age):.0f} s ago")
    else:
        last = "no heartbeat so far" if age is None else f"last heartbeat {local_time(now - age)}"
        start = errors.typed("xai-refresher")
        yield warning(
            f"not running ({last}), so nothing renews the login; "
            f"start {errors.SERVE}, or {start} alone"
        )


def keys(settings: config.Config) -> Finding:
    path, make = settings.client_keys_file, errors.typed("xai-client-key add NAME")
    try:
        known = client_keys.load(path)
    except FileNotFoundError:
        return _no_key_file(settings, make)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return failure(
            errors.EXIT_CONFIGURATION,
            f"{path} cannot be used ({reason}), so no caller is admitted; correct or remove it",
        )
    if not known:
        return failure(
            errors.EXIT_CONFIGURATION,
            f"{path} holds no key, so no caller is admitted; {make}, or remove it and restart "
            "the proxy, which then requires none",
        )
    return ok(f"required for every call; {path} holds {len(known)}")


def _no_key_file(settings: config.Config, make: str) -> Finding:
    path = settings.client_keys_file
    if path != settings.token_path.parent / "client-keys":
        return failure(
            errors.EXIT_CONFIGURATION, f"{path} does not exist, so no caller is admitted; {make}"
        )
    if isinstance(settings.bind, addresses.UnixSocket):
        return ok(
            f"no client key required: any program that may write to {settings.bind.path} may call"
        )
    if addresses.is_loopback(settings.bind):
        return ok("no client key required: every program on this machine may call")
    if settings.allow_anonymous:
        return warning(
            "no client key required: whatever can connect to "
            f"{settings.bind} can spend your quota; {make}"
        )
    return failure(
        errors.EXIT_CONFIGURATION,
        f"there is no client key, and without one the proxy does not start on {settings.bind}; "
        f"{make}, or set XAI_PROXY_ALLOW_ANONYMOUS=1",
    )


def descriptors(connections: int, limit: int) -> Finding:
    """`limit`: the hard limit, up to which the proxy raises its own."""
    if limit == resource.RLIM_INFINITY or limit >= config.descriptors_for(connections):
        return ok(f"enough for {connections} client connections")
    more = f"; supervisord needs {SUPERVISOR_DESCRIPTORS}" if limit < SUPERVISOR_DESCRIPTORS else ""
    return warning(
        f"the limit of {limit} has room for {config.connections_within(limit)} client "
        f"connections, not {connections}{more}; raise it (ulimit -Hn, or LimitNOFILE= of a "
        "systemd unit), or lower XAI_PROXY_MAX_CONNECTIONS"
    )
