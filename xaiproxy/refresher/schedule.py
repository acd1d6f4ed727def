"""When the refresh token is spent: the refresher's decisions, without a clock, file or network of their own.

Two clocks come in as arguments. `now` is unix time: tokens expire by it, and it may jump. `uptime` is seconds on
a clock that only runs forward, also while the machine sleeps: waits are measured by it.

Failures are of three kinds. Nothing was spent (no connection, or a definite answer): again, with backoff. Sent,
but no whole answer came: the refresh token may be spent, and presenting a spent one makes xAI revoke the whole
login, so it is tried a few times while a grace may last, and then only when there is little left to lose.
Refused: never again.

What limits the tries is in the file, so that it holds for all refreshers of a login and for those that begin anew:
`refresh_try` and `asked` before the refresh token is sent, and `refresh_error` after a try has failed. Its times are
unix times; each refresher turns them into uptimes when it first reads them, and no later step of the clock moves them.
"""

import dataclasses
import enum
import math
import random
from collections.abc import Callable

from xaiproxy import errors, tokens

BACKOFF, BACKOFF_LIMIT = 1.0, 60.0  # seconds; the first wait, doubled for each further failure
# Seconds from expiry to the next try, unless the refresh token may be spent: requests fail until then, and the proxy
# tells them to come again within so many.
EXPIRED_LIMIT = 10.0
RETRY_AFTER_LIMIT = 300.0  # seconds that we let the issuer's Retry-After make us wait
STANDING_WAIT = (
    300.0  # seconds after a refusal of client or plan, which heals by itself or not at all
)
LOST_TRIES, LOST_WINDOW = (
    3,
    30.0,
)  # tries, and seconds from the first of them, when answers are lost
LAST_TRY = 600.0  # seconds before expiry, or a tenth of the lifetime if that is less: then a lost answer is tried again
ASKED_WAIT, ASKED_WAIT_LIMIT = (
    120.0,
    3600.0,
)  # seconds between two refreshes that upstream's refusals ask for
DOUBTS = 3  # tries in a row with the same answer until a refusal that is not RFC 6749's is believed

# The codes of a refresh_error, beside those of tokens.py and of OAuth.
REFUSED_FOR_NOW = "refused_for_now"
STALE_AT_ONCE = "stale_at_once"


class Decision(enum.Enum):
    NOTHING = "nothing"
    REFRESH = "refresh"
    DECLINE = "decline"  # upstream refuses the token, but it is too early for another


class Schedule:
    """What is remembered from one poll of the file to the next: its records, in seconds of uptime."""

    def __init__(self, skew: float, random: Callable[[], float] = random.random):
        self._skew = skew
        self._random = random
        self._begin(None)

    def _begin(self, login: tokens.Tokens | None) -> None:
        self._known = login and (login.access_token, login.refresh_token)
        self._filed: tuple | None = None  # the records of the file when it was last read
        self._written: tuple = ()  # the last ones that this process made, which it knows more about than the file
        self.failures = 0
        self._not_before = -math.inf
        self._terminal = False
        self._tries = 0  # without a definite answer
        self._first_at = -math.inf  # unix seconds, of the first of them
        self._window_end = math.inf  # when it is too late for the issuer to overlook another
        self._before = self._tries, self._first_at, self._window_end  # of the latest `begun`
        self._asked_not_before = -math.inf
        self._declined = False

    def watch(self, login: tokens.Tokens, now: float, uptime: float) -> bool:
        """Follow the records of the file; return whether its login is another one than before."""
        new = self._known != (login.access_token, login.refresh_token)
        if new:
            self._begin(login)
        records = _records(login)
        if records != self._filed and records not in self._written:
            self._take_over(login, now, uptime)
        self._filed = records
        return new

    def _take_over(self, login: tokens.Tokens, now: float, uptime: float) -> None:
        error, refresh_try, asked = _records(login)
        waits = [0.0]
        self.failures = error.failures if error else 0
        self._terminal = error is not None and error.terminal
        # A failure in the future: the clock was set back since, and the time of the next try means nothing.
        if (
            error
            and error.retry_at
            and error.at <= now
            and error.code not in (tokens.ANSWER_LOST, tokens.UPSTREAM_REFUSES)
        ):
            waits.append(min(error.retry_at - now, STANDING_WAIT))
        self._tries = refresh_try.tries if refresh_try else 0
        if refresh_try is None:
            self._first_at, self._window_end = -math.inf, math.inf
        else:
            waits.append(min(refresh_try.next_at - now, BACKOFF_LIMIT))
            if refresh_try.first_at != self._first_at:
                self._first_at = refresh_try.first_at
                left = self._first_at + LOST_WINDOW - now
                # A first try in the future: the clock was set back since, and how long ago it was is unknown.
                self._window_end = uptime + left if 0 <= left <= LOST_WINDOW else -math.inf
        self._not_before = uptime + max(waits)
        self._take_over_asked(asked, now, uptime)

    def _take_over_asked(self, asked: tokens.Asked | None, now: float, uptime: float) -> None:
        self._asked_not_before = (
            uptime + min(asked.next_at - now, asked.wait, ASKED_WAIT_LIMIT) if asked else -math.inf
        )

    def decide(self, login: tokens.Tokens, asked: bool, now: float, uptime: float) -> Decision:
        """`asked`: upstream has refused this login's access token."""
        if self._terminal or login.refresh_token is None or uptime < self._not_before:
            return Decision.NOTHING
        if self._may_be_spent(uptime):
            due = now >= last_try_at(login)
        else:
            due = login.state(now, self._skew) is not tokens.State.FRESH
        # A refresh that was asked for and has begun is not another one.
        if due or (asked and (self._tries or uptime >= self._asked_not_before)):
            return Decision.REFRESH
        if asked and login.refresh_error is None and not self._declined:
            return Decision.DECLINE
        return Decision.NOTHING

    def begun(self, login: tokens.Tokens, asked: bool, now: float, uptime: float) -> tokens.Tokens:
        """The login with what must be in the file before its refresh token is sent."""
        former = login.refresh_try
        self._before = self._tries, self._first_at, self._window_end
        if not self._tries:
            self._window_end = uptime + LOST_WINDOW
        self._first_at = min(self._first_at, now) if self._tries else now
        self._tries += 1
        refresh_try = tokens.RefreshTry(
            tokens.fingerprint(login.refresh_token),
            self._first_at,
            self._tries,
            now + self._backoff(self.failures + 1),
        )
        record = login.asked
        if asked and not (former and record):
            wait = min(2 * record.wait if record else ASKED_WAIT, ASKED_WAIT_LIMIT)
            record = tokens.Asked(now + wait, wait)
        return self._note(dataclasses.replace(login, refresh_try=refresh_try, asked=record))

    def withdrawn(self, login: tokens.Tokens, now: float) -> tokens.Tokens:
        """The login without the try that `begun` counted: its refresh token was not sent, or got a definite answer.

        `login`: as it was before `begun`.
        """
        self._tries, self._first_at, self._window_end = self._before
        refresh_try = None
        if self._tries:
            refresh_try = tokens.RefreshTry(
                tokens.fingerprint(login.refresh_token),
                self._first_at,
                self._tries,
                login.refresh_try.next_at if login.refresh_try else now,
            )
        return self._note(dataclasses.replace(login, refresh_try=refresh_try))

    def failed(
        self,
        error: errors.Error,
        code: str,
        login: tokens.Tokens,
        begun: tokens.Tokens | None,
        now: float,
        uptime: float,
    ) -> tokens.Tokens:
        """The login with the failure, and with the next try in it: refresh_error's `retry_at`, None when terminal.

        `login`: as it was before the try; `begun`: what `begun` made of it, None when the try did not come so far.
        """
        if begun is not None and getattr(error, "sent", False):
            login = begun
            self._take_over_asked(login.asked, now, uptime)
        elif begun is not None:
            login = self.withdrawn(login, now)
        former = login.refresh_error
        self.failures += 1
        alike = 1 + (former.alike if former and former.code == code else 0)
        refused = isinstance(error, errors.GrantRefused)
        self._terminal = refused and (error.certain or alike >= DOUBTS)
        wait = self._wait_after(error, max(0.0, login.expires_at - now))
        self._not_before = uptime + wait
        if login.refresh_try is not None:
            login = dataclasses.replace(
                login, refresh_try=dataclasses.replace(login.refresh_try, next_at=now + wait)
            )
        retry_at = now + wait
        if self._may_be_spent(self._not_before):
            retry_at = max(retry_at, last_try_at(login))
        description = str(error)
        if code == REFUSED_FOR_NOW and alike >= DOUBTS and login.expires_at <= now:
            description += f"; if that lasts, {errors.SIGN_IN}"
        return self._note(
            dataclasses.replace(
                login,
                refresh_error=tokens.RefreshError(
                    code,
                    description,
                    now,
                    self._terminal,
                    None if self._terminal else retry_at,
                    self.failures,
                    alike,
                    tokens.fingerprint(login.refresh_token),
                ),
            )
        )

    def succeeded(
        self, successor: tokens.Tokens, begun: tokens.Tokens, asked: bool, now: float, uptime: float
    ) -> tokens.Tokens:
        """The new login as the file shall have it.

        `asked`: upstream had refused the access token that it succeeds. A successor that is stale already counts as a
        failure: the next try is in its refresh_error.
        """
        failures = self.failures
        self._begin(successor)
        if asked:
            wait = begun.asked.wait
            successor = dataclasses.replace(successor, asked=tokens.Asked(now + wait, wait))
            self._asked_not_before = uptime + wait
        # Otherwise the last token was not refused: it has lasted.
        if successor.state(now, self._skew) is not tokens.State.FRESH:
            self.failures = failures + 1
            wait = self._backoff(self.failures)
            self._not_before = uptime + wait
            successor = dataclasses.replace(
                successor,
                refresh_error=tokens.RefreshError(
                    STALE_AT_ONCE,
                    f"{successor.issuer} gave an access token that ends within moments; check this machine's "
                    "clock",
                    now,
                    retry_at=now + wait,
                    failures=self.failures,
                ),
            )
        return self._note(successor)

    def declined(
        self, login: tokens.Tokens, description: str, now: float, uptime: float
    ) -> tokens.Tokens:
        """The login with the refusal to refresh it; refresh_error's `retry_at` is when that is allowed again."""
        self._declined = True
        return self._note(
            dataclasses.replace(
                login,
                refresh_error=tokens.RefreshError(
                    tokens.UPSTREAM_REFUSES,
                    description,
                    now,
                    retry_at=now + self.asked_wait(uptime),
                ),
            )
        )

    def asked_wait(self, uptime: float) -> float:
        """Seconds until a refusal by upstream may cause another refresh."""
        return self._asked_not_before - uptime

    def hurry(self) -> None:
        """Wait no longer."""
        self._not_before = -math.inf

    def _note(self, login: tokens.Tokens) -> tokens.Tokens:
        self._written = (*self._written[-2:], _records(login))
        return login

    def _may_be_spent(self, uptime: float) -> bool:
        """Whether the refresh token may be spent and it is too late for the issuer to overlook that."""
        return self._tries >= LOST_TRIES or (self._tries > 0 and uptime > self._window_end)

    def _wait_after(self, error: errors.Error, left: float) -> float:
        """`left`: seconds until the access token expires."""
        if isinstance(error, (errors.NotEntitled, errors.ClientRejected)):
            return STANDING_WAIT
        backoff = self._backoff(self.failures)
        lost = getattr(error, "sent", False)
        wait = min(backoff, BACKOFF_LIMIT if lost else left + EXPIRED_LIMIT)
        return max(wait, min(getattr(error, "retry_after", None) or 0.0, RETRY_AFTER_LIMIT))

    def _backoff(self, failures: int) -> float:
        """1, 2, 4 … 60 seconds, each shortened by up to a half so that many of us do not come at once."""
        return min(BACKOFF * 2 ** min(failures - 1, 16), BACKOFF_LIMIT) * (1 - self._random() / 2)


def last_try_at(login: tokens.Tokens) -> float:
    """Unix seconds at which a refresh token that may be spent is sent once more: there is little left to lose."""
    lifetime = login.lifetime()
    return login.expires_at - (LAST_TRY if lifetime is None else min(LAST_TRY, lifetime / 10))


def _records(login: tokens.Tokens) -> tuple:
    return login.refresh_error, login.refresh_try, login.asked
