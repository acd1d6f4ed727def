"""The judgement of a login: made here alone, for /readyz, the logs, --status and --doctor."""

import dataclasses
import enum
import errno
import os
import re
import time
from collections.abc import Callable

from xaiproxy import errors, log, refresher_status, tokens
from xaiproxy.token_store import ALIVE, TokenStore

# Any client gets to see this one, so it has no path of the checkout.
SIGN_IN = "run `xai-login --device` to sign in"
# Why a file cannot be written, in the operating system's words.
STORAGE_FAULTS = [
    os.strerror(number)
    for number in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ESTALE,
    )
]
CODE = re.compile(r"[A-Za-z0-9_.-]{1,60}")  # an issuer's codes that are repeated


class Verdict(enum.Enum):
    GOOD = "good"
    # The token is valid, and its renewal fails.
    FAILING = "failing"
    # No renewed login can be saved.
    NO_ROOM = "no_room"
    NO_REFRESHER = "no_refresher"
    NO_REFRESH_TOKEN = "no_refresh_token"
    # By the API, though it has not expired.
    REFUSED = "refused"
    # And renewal is still being tried.
    EXPIRED = "expired"
    # Only a new login helps.
    ENDED = "ended"
    NO_LOGIN = "no_login"
    # The file holds no login, or one of another user or issuer.
    UNUSABLE = "unusable"
    # For a reason that may pass.
    UNREAD = "unread"


WHILE_VALID = {
    Verdict.NO_REFRESH_TOKEN: "the token file holds no refresh token; the login lapses at {expiry}",
    Verdict.NO_REFRESHER: "no refresher; the login lapses at {expiry}",
    Verdict.NO_ROOM: "the token is good until {expiry}, but no renewed login can be saved{why}",
    Verdict.FAILING: "the token is good until {expiry}, but its renewal fails ({code})",
    Verdict.GOOD: "signed in",
}
AFTERWARDS = {
    Verdict.NO_REFRESH_TOKEN: "{fault}, and the token file holds no refresh token; "
    f"{SIGN_IN}, or replace the file",
    Verdict.NO_REFRESHER: "{token} has not been renewed yet: no refresher runs",
    Verdict.NO_ROOM: "{fault} and no renewed login can be saved{why}",
    Verdict.REFUSED: "{token} has not been renewed yet",
    Verdict.EXPIRED: "{token} has not been renewed yet",
}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """`ready`: whether a request can be served now. `exit_code`: `--status`'s, 0 if ready.

    `reason`: a sentence without its full stop. Any client gets to see it: it has states and codes,
    but no path, and no text that a server or another user wrote.
    """

    verdict: Verdict
    ready: bool
    exit_code: int
    reason: str

    @property
    def sentence(self) -> str:
        return f"{self.reason[0].upper()}{self.reason[1:]}."


def of(store: TokenStore, now: float, read: Callable[[], tokens.Login] | None = None) -> Judgement:
    """Judge by the files. `read`: how to read the login; by default as the proxy does."""
    try:
        login = (read or store.last_known)()
    except errors.LoginUnusable as error:
        return _of_unusable(error)
    return judge(
        login,
        now,
        store.refresher_age(now),
        store.is_refused(login, now),
        refresher_status.read(store, login, now),
        elsewhere=bool(store.settings.refresher),
    )


def judge(
    login: tokens.Login | errors.LoginUnusable,
    now: float,
    refresher_age: float | None,
    refused: bool,
    status: refresher_status.Status | None,
    *,
    elsewhere: bool = False,
) -> Judgement:
    """`refused`: whether the API refused the access token; `status`: a recent one, if any.

    `elsewhere`: whether a file without a refresh token is renewed by a refresher on another
    machine.
    """
    if isinstance(login, errors.LoginUnusable):
        return _of_unusable(login)
    # UTC, as all times in the log; a proxy in a container may have another zone than its operator.
    expiry = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(login.expires_at))
    fault = f"the access token expired at {expiry}"
    token = f"{fault} and"
    if refused:
        fault = "the API refuses the access token"
        token = f"{fault}, which"
    valid = login.expires_at > now and not refused
    code = _failure(login, refused, status)

    if login.refresh_error is not None and login.refresh_error.terminal:
        reason = f"the login has ended ({code}); {SIGN_IN}"
        if valid:
            reason = f"the token is good until {expiry}, but {reason}"
        elif refused:
            reason = f"{fault}, and {reason}"
        return Judgement(Verdict.ENDED, valid, errors.EXIT_SIGN_IN, reason)

    exit_code = 0 if valid else errors.EXIT_TRY_AGAIN
    has_refresher_here = login.refresh_token is not None
    if not has_refresher_here and not elsewhere:
        verdict = Verdict.NO_REFRESH_TOKEN
        exit_code = 0 if valid else errors.EXIT_SIGN_IN
    elif has_refresher_here and (refresher_age is None or abs(refresher_age) >= ALIVE):
        verdict = Verdict.NO_REFRESHER
    elif status is not None and status.no_room:
        verdict = Verdict.NO_ROOM
    elif valid:
        verdict = Verdict.FAILING if code else Verdict.GOOD
    else:
        verdict = Verdict.REFUSED if refused else Verdict.EXPIRED
    template = (WHILE_VALID if valid else AFTERWARDS)[verdict]
    if code and verdict in (Verdict.REFUSED, Verdict.EXPIRED):
        template = "{token} cannot be renewed ({code})"
    why = _why_no_room(status.no_room) if status is not None else ""
    reason = template.format(expiry=expiry, fault=fault, token=token, code=code, why=why)
    return Judgement(verdict, valid, exit_code, reason)


def _failure(login: tokens.Login, refused: bool, status: refresher_status.Status | None) -> str:
    """Return the code of the failure that lasts, or ""."""
    error = login.refresh_error
    if error is not None and (error.code != tokens.UPSTREAM_REFUSES or refused):
        code = error.code
    else:
        # No failure, or upstream accepts the access token again.
        code = status.failure if status is not None else ""
    return code if not code or CODE.fullmatch(code) else "unknown error"


def _why_no_room(no_room: str) -> str:
    """Return the operating system's reason in brackets; the rest of the sentence has paths."""
    return next((f" ({text})" for text in STORAGE_FAULTS if text in no_room), "")


def _of_unusable(error: errors.LoginUnusable) -> Judgement:
    if isinstance(error, errors.LoginUnread):
        verdict = Verdict.UNREAD
        reason = "the token file cannot be read at the moment; see the log"
    else:
        verdict = Verdict.NO_LOGIN if error.state == "missing" else Verdict.UNUSABLE
        reason = f"no login that can be used ({error.state}); {SIGN_IN}, or see the log"
    return Judgement(verdict, False, error.exit_code, reason)


def reported_failure(store: TokenStore, login: tokens.Login, now: float) -> list[str]:
    """Return the last failure by the refresher's status, in sentences: tokens.json may lack it."""
    status = refresher_status.read(store, login, now)
    if status is None:
        return []
    texts = status.no_room, status.reason if status.failure else ""
    return [
        f"The refresher reports: {log.CONTROLS.sub(' ', text)}."
        for text in dict.fromkeys(texts)
        if text
    ]
