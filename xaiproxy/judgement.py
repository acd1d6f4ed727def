"""The judgement of a login, made in one place for /readyz, the proxy's log, `xai-login --status` and `--doctor`."""

import dataclasses
import enum
import re
import time
from collections.abc import Callable

from xaiproxy import errors, log, refresher_status, tokens
from xaiproxy.token_store import ALIVE, TokenStore

# Everybody may read this one: no path of the checkout.
SIGN_IN = "run `xai-login --device` to sign in"
CODE = re.compile(r"[A-Za-z0-9_.-]{1,60}")  # what of an issuer's codes is repeated


class Verdict(enum.Enum):
    GOOD = "good"
    FAILING = "failing"  # the token is valid, its renewal fails
    NO_ROOM = "no_room"  # no renewed login can be saved
    NO_REFRESHER = "no_refresher"
    NO_REFRESH_TOKEN = "no_refresh_token"
    REFUSED = "refused"  # by the API, though not expired
    EXPIRED = "expired"  # and a renewal is still tried
    ENDED = "ended"  # only signing in helps
    NO_LOGIN = "no_login"
    UNUSABLE = "unusable"  # the file is no login, another user's, or another issuer's
    UNREAD = "unread"  # for a reason that passes


@dataclasses.dataclass(frozen=True)
class Judgement:
    """`ready`: whether a request can be served now. `exit_code`: that of `--status`, 0 when the login is usable.

    `reason`: a sentence without its full stop. Everybody may read it: it holds states and codes, but no path and
    nothing that others wrote.
    """

    verdict: Verdict
    ready: bool
    exit_code: int
    reason: str

    @property
    def sentence(self) -> str:
        return f"{self.reason[0].upper()}{self.reason[1:]}."


def judge(
    login: tokens.Tokens | errors.LoginUnusable,
    now: float,
    refresher_age: float | None,
    refused: bool,
    status: refresher_status.Status | None,
) -> Judgement:
    """`refused`: whether the API refused the access token; `status`: the refresher's own, if there is a recent one."""
    if isinstance(login, errors.LoginUnusable):
        return _of_unusable(login)
    error = login.refresh_error
    if error is not None and error.code == tokens.UPSTREAM_REFUSES and not refused:
        error = None  # it was, and upstream takes the access token again
    code = error.code if error is not None else status.failure if status is not None else ""
    if code and not CODE.fullmatch(code):
        code = "unknown error"
    alive = refresher_age is not None and abs(refresher_age) < ALIVE
    expiry = time.strftime("%Y-%m-%d %H:%M", time.localtime(login.expires_at))
    valid = login.expires_at > now and not refused

    if error is not None and error.terminal:
        ended = f"the login has ended ({code}); {SIGN_IN}"
        if valid:
            ended = f"the token is good until {expiry}, but {ended}"
        elif refused:
            ended = f"the API refuses the access token, and {ended}"
        return Judgement(Verdict.ENDED, valid, errors.EXIT_SIGN_IN, ended)
    if valid:
        if login.refresh_token is None:
            return _usable(
                Verdict.NO_REFRESH_TOKEN,
                f"the token file holds no refresh token; the login lapses at {expiry}",
            )
        if not alive:
            return _usable(Verdict.NO_REFRESHER, f"no refresher; the login lapses at {expiry}")
        if status is not None and status.no_room:
            return _usable(
                Verdict.NO_ROOM,
                f"the token is good until {expiry}, but no renewed login can be saved",
            )
        if code:
            return _usable(
                Verdict.FAILING, f"the token is good until {expiry}, but its renewal fails ({code})"
            )
        return _usable(Verdict.GOOD, "signed in")

    fault = (
        "the API refuses the access token" if refused else f"the access token expired at {expiry}"
    )
    if login.refresh_token is None:
        verdict, exit_code = Verdict.NO_REFRESH_TOKEN, errors.EXIT_SIGN_IN
        fault += f", and the token file holds no refresh token; {SIGN_IN}, or replace the file"
    else:
        verdict, exit_code = Verdict.REFUSED if refused else Verdict.EXPIRED, errors.EXIT_TRY_AGAIN
        if not alive:
            verdict, fault = (
                Verdict.NO_REFRESHER,
                f"{fault} and has not been renewed yet: no refresher runs",
            )
        elif status is not None and status.no_room:
            verdict, fault = Verdict.NO_ROOM, f"{fault} and no renewed login can be saved"
        else:
            fault += f" and cannot be renewed ({code})" if code else " and has not been renewed yet"
    return Judgement(verdict, False, exit_code, fault)


def _of_unusable(error: errors.LoginUnusable) -> Judgement:
    if isinstance(error, errors.LoginUnread):
        return Judgement(
            Verdict.UNREAD,
            False,
            error.exit_code,
            "the token file cannot be read at the moment; see the log",
        )
    verdict = Verdict.NO_LOGIN if error.state == "missing" else Verdict.UNUSABLE
    return Judgement(
        verdict,
        False,
        error.exit_code,
        f"no login that can be used ({error.state}); {SIGN_IN}, or see the log",
    )


def _usable(verdict: Verdict, reason: str) -> Judgement:
    return Judgement(verdict, True, 0, reason)


def reported_failure(store: TokenStore, login: tokens.Tokens, now: float) -> list[str]:
    """The last failure in the refresher's own status, in sentences; for when tokens.json could not take it."""
    status = refresher_status.read(store, login, now)
    if status is None:
        return []
    texts = status.no_room, status.reason if status.failure else ""
    return [
        f"The refresher says: {log.CONTROLS.sub(' ', text)}."
        for text in dict.fromkeys(texts)
        if text
    ]


def of(store: TokenStore, now: float, read: Callable[[], tokens.Tokens] | None = None) -> Judgement:
    """Judge what the files say now. `read`: how the login is read, if not as the proxy does."""
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
    )
