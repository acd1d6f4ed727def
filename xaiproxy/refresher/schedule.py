"""When the refresh token is spent: the refresher's decisions, without a clock, file or network.

Two clocks come in as arguments. `now` is unix time: tokens expire by it, and it may jump. `uptime`
is seconds on a clock that never goes back, also while the machine sleeps: it measures waits.

There are three kinds of failure. Nothing was spent (no connection, or a definite answer): the
refresh is retried with backoff. It was sent, but no complete answer came: the refresh token may be
spent, and presenting a spent one makes xAI revoke the whole login. So it is retried a few times,
while the issuer may still overlook that, and then only when there is little left to lose. Refused:
it is never retried.

The records that limit the tries are in the file, so that the limits hold for all refreshers of a
login and across restarts: `refresh_try` and `asked` before the refresh token is sent,
`refresh_error` after a try has failed. Their times are unix times. Each refresher converts them to
uptimes when it first reads them, and no later step of the clock moves them.
"""

import dataclasses
import enum
import math
import random
from collections.abc import Callable

from xaiproxy import errors, tokens
from xaiproxy.tokens import Login, fingerprint

# Seconds; the first wait, doubled for each further failure, and its limit.
BACKOFF, BACKOFF_LIMIT = 1.0, 60.0
# Seconds from expiry to the next try, unless the refresh token may be spent: requests fail until
# then, and their Retry-After is no longer.
EXPIRED_LIMIT = 10.0
RETRY_AFTER_LIMIT = 300.0  # seconds up to which an issuer's Retry-After is honoured
# Seconds after a refusal of the client or the plan, which heals by itself or not at all.
STANDING_WAIT = 300.0
# Tries, and seconds from the first of them, when responses are lost.
LOST_TRIES, LOST_WINDOW = 3, 30.0
# Seconds before expiry, or a tenth of the lifetime if that is less, at which a refresh token that
# may be spent is sent once more.
LAST_TRY = 600.0
# Seconds between two refreshes that upstream's refusals ask for, and their limit.
ASKED_WAIT, ASKED_WAIT_LIMIT = 120.0, 3600.0
# Tries in a row with the same answer until a refusal in other words than RFC 6749's is final.
DOUBTS = 3

# Codes of a refresh_error, beside those of tokens.py and of OAuth.
REFUSED_FOR_NOW = "refused_for_now"
STALE_AT_ONCE = "stale_at_once"

Records = tuple[tokens.RefreshError | None, tokens.RefreshTry | None, tokens.Asked | None]


class Decision(enum.Enum):
    NOTHING = "nothing"
    REFRESH = "refresh"
    # Upstream refuses the token, but the next refresh may not begin yet.
    DECLINE = "decline"


@dataclasses.dataclass(frozen=True)
class Sent:
    """The tries with one refresh token that got no definite answer.

    `first_at`: unix seconds of the first. `window_end`: uptime after which the issuer does not
    overlook another.
    """

    tries: int = 0
    first_at: float = -math.inf
    window_end: float = math.inf

    def may_be_spent(self, uptime: float) -> bool:
        """Whether the token may be spent, and it is too late for the issuer to overlook that."""
        return self.tries >= LOST_TRIES or (self.tries > 0 and uptime > self.window_end)


class Schedule:
    """The records of the file, in seconds of uptime, from one poll of the file to the next.

    `failures`: number of refreshes in a row that failed.
    """

    def __init__(self, skew: float, random: Callable[[], float] = random.random):
        self._skew = skew
        self._random = random
        self._begin(None)

    def _begin(self, login: Login | None) -> None:
        self._known = login and (login.access_token, login.refresh_token)
        # The records of the file when it was last read.
        self._filed: Records | None = None
        # The last records that this process made: it knows more about them than the file has.
        self._written: tuple[Records, ...] = ()
        self.failures = 0
        self._not_before = -math.inf
        self._terminal = False
        self._sent = Sent()
        # Before the latest `begun`.
        self._sent_before = self._sent
        self._asked_not_before = -math.inf
        self._declined = False

    def watch(self, login: Login, now: float, uptime: float) -> bool:
        """Follow the records of the file; return whether its login is a new one."""
        new = self._known != (login.access_token, login.refresh_token)
        if new:
            self._begin(login)
        records = _records(login)
        if records != self._filed and records not in self._written:
            self._take_over(login, now, uptime)
        self._filed = records
        return new

    def _take_over(self, login: Login, now: float, uptime: float) -> None:
        error, refresh_try, asked = _records(login)
        waits = [0.0]
        self.failures = error.failures if error else 0
        self._terminal = error is not None and error.terminal
        # If the failure is in the future, the clock was set back since, and retry_at means nothing.
        if (
            error
            and error.retry_at
            and error.at <= now
            and error.code not in (tokens.ANSWER_LOST, tokens.UPSTREAM_REFUSES)
        ):
            waits.append(min(error.retry_at - now, STANDING_WAIT))
        if refresh_try is None:
            self._sent = Sent()
        else:
            waits.append(min(refresh_try.next_at - now, BACKOFF_LIMIT))
            window_end = self._sent.window_end
            if refresh_try.first_at != self._sent.first_at:
                left = refresh_try.first_at + LOST_WINDOW - now
                # If the first try is in the future, the clock was set back since, and the time that
                # has passed is unknown.
                window_end = uptime + left if 0 <= left <= LOST_WINDOW else -math.inf
            self._sent = Sent(refresh_try.tries, refresh_try.first_at, window_end)
        self._not_before = uptime + max(waits)
        self._take_over_asked(asked, now, uptime)

    def _take_over_asked(self, asked: tokens.Asked | None, now: float, uptime: float) -> None:
        self._asked_not_before = (
            uptime + min(asked.next_at - now, asked.wait, ASKED_WAIT_LIMIT) if asked else -math.inf
        )

    def decide(self, login: Login, asked: bool, now: float, uptime: float) -> Decision:
        """`asked`: whether upstream has refused this login's access token."""
        if self._terminal or login.refresh_token is None or uptime < self._not_before:
            return Decision.NOTHING
        if self._sent.may_be_spent(uptime):
            due = now >= last_try_at(login)
        else:
            due = login.state(now, self._skew) is not tokens.State.FRESH
        # An asked refresh that has begun is not another one.
        if due or (asked and (self._sent.tries or uptime >= self._asked_not_before)):
            return Decision.REFRESH
        if asked and login.refresh_error is None and not self._declined:
            return Decision.DECLINE
        return Decision.NOTHING

    def begun(self, login: Login, asked: bool, now: float, uptime: float) -> Login:
        """Return the login with the records that the file must hold before the token is sent."""
        former, sent = login.refresh_try, self._sent
        self._sent_before = sent
        if sent.tries:
            self._sent = Sent(sent.tries + 1, min(sent.first_at, now), sent.window_end)
        else:
            self._sent = Sent(1, now, uptime + LOST_WINDOW)
        refresh_try = self._try(login, now + self._backoff(self.failures + 1))
        record = login.asked
        if asked and not (former and record):
            wait = min(2 * record.wait if record else ASKED_WAIT, ASKED_WAIT_LIMIT)
            record = tokens.Asked(now + wait, wait)
        return self._note(dataclasses.replace(login, refresh_try=refresh_try, asked=record))

    def withdrawn(self, login: Login, now: float) -> Login:
        """Return the login without the try that `begun` counted.

        The refresh token was not sent, or got a definite answer. `login`: as it was before `begun`.
        """
        self._sent = self._sent_before
        refresh_try = None
        if self._sent.tries:
            refresh_try = self._try(login, login.refresh_try.next_at if login.refresh_try else now)
        return self._note(dataclasses.replace(login, refresh_try=refresh_try))

    def _try(self, login: Login, next_at: float) -> tokens.RefreshTry:
        sent = self._sent
        return tokens.RefreshTry(_mark(login), sent.first_at, sent.tries, next_at)

    def failed(
        self,
        error: errors.Error,
        login: Login,
        begun: Login | None,
        now: float,
        uptime: float,
    ) -> tuple[Login, tokens.RefreshError]:
        """Return the login with the failure, and the failure itself with the time of the next try.

        `login`: as it was before the try. `begun`: the result of `begun`; None if the try ended
        before that.
        """
        if begun is not None and getattr(error, "sent", False):
            login = begun
            self._take_over_asked(login.asked, now, uptime)
        elif begun is not None:
            login = self.withdrawn(login, now)
        code, former = code_of(error), login.refresh_error
        self.failures += 1
        alike = 1 + (former.alike if former and former.code == code else 0)
        self._terminal = isinstance(error, errors.GrantRefused) and (
            error.certain or alike >= DOUBTS
        )
        wait = self._wait_after(error, max(0.0, login.expires_at - now))
        self._not_before = uptime + wait
        refresh_try = login.refresh_try
        if refresh_try is not None:
            refresh_try = dataclasses.replace(refresh_try, next_at=now + wait)
        retry_at = now + wait
        if self._sent.may_be_spent(self._not_before):
            retry_at = max(retry_at, last_try_at(login))
        description = str(error)
        if code == REFUSED_FOR_NOW and alike >= DOUBTS and login.expires_at <= now:
            description += f"; if that lasts, {errors.SIGN_IN}"
        record = tokens.RefreshError(
            code,
            description,
            now,
            self._terminal,
            None if self._terminal else retry_at,
            self.failures,
            alike,
            _mark(login),
        )
        login = dataclasses.replace(login, refresh_try=refresh_try, refresh_error=record)
        return self._note(login), record

    def succeeded(
        self, successor: Login, begun: Login, asked: bool, now: float, uptime: float
    ) -> Login:
        """Return the new login as the file is to hold it.

        `asked`: whether upstream had refused the former access token; if not, that one has lasted,
        and `asked` is not carried over. A successor that is stale already counts as a failure, with
        the time of the next try in its refresh_error.
        """
        failures = self.failures
        self._begin(successor)
        if asked and begun.asked:
            wait = begun.asked.wait
            successor = dataclasses.replace(successor, asked=tokens.Asked(now + wait, wait))
            self._asked_not_before = uptime + wait
        if successor.state(now, self._skew) is not tokens.State.FRESH:
            self.failures = failures + 1
            wait = self._backoff(self.failures)
            self._not_before = uptime + wait
            record = tokens.RefreshError(
                STALE_AT_ONCE,
                f"{successor.issuer} gave an access token that ends within moments; check this "
                "machine's clock",
                now,
                retry_at=now + wait,
                failures=self.failures,
            )
            successor = dataclasses.replace(successor, refresh_error=record)
        return self._note(successor)

    def declined(self, login: Login, description: str, now: float, uptime: float) -> Login:
        """Return the login with the decision not to refresh it, and when that may be done again."""
        self._declined = True
        record = tokens.RefreshError(
            tokens.UPSTREAM_REFUSES, description, now, retry_at=now + self.asked_wait(uptime)
        )
        return self._note(dataclasses.replace(login, refresh_error=record))

    def asked_wait(self, uptime: float) -> float:
        """Return the seconds until a refusal by upstream may cause another refresh."""
        return self._asked_not_before - uptime

    def hurry(self) -> None:
        """End the current wait."""
        self._not_before = -math.inf

    def _note(self, login: Login) -> Login:
        self._written = (*self._written[-2:], _records(login))
        return login

    def _wait_after(self, error: errors.Error, left: float) -> float:
        """`left`: seconds until the access token expires."""
        if isinstance(error, (errors.NotEntitled, errors.ClientRejected)):
            return STANDING_WAIT
        limit = BACKOFF_LIMIT if getattr(error, "sent", False) else left + EXPIRED_LIMIT
        retry_after = float(getattr(error, "retry_after", None) or 0.0)
        return max(min(self._backoff(self.failures), limit), min(retry_after, RETRY_AFTER_LIMIT))

    def _backoff(self, failures: int) -> float:
        """Return 1, 2, 4 … 60 seconds, less up to a half, so that refreshers do not synchronise."""
        return min(BACKOFF * 2.0 ** min(failures - 1, 16), BACKOFF_LIMIT) * (1 - self._random() / 2)


def last_try_at(login: Login) -> float:
    """Return when a refresh token that may be spent is sent once more: little is left to lose."""
    lifetime = login.lifetime()
    return login.expires_at - (LAST_TRY if lifetime is None else min(LAST_TRY, lifetime / 10))


def code_of(error: errors.Error) -> str:
    """Return the code of the refresh_error that records `error`."""
    if isinstance(error, errors.OAuthError):
        return error.error
    if not isinstance(error, (errors.IssuerUnavailable, errors.NotClaimed)):
        return "storage"
    if error.sent:
        return tokens.ANSWER_LOST
    if isinstance(error, errors.NotClaimed):
        return "not_claimed"
    return REFUSED_FOR_NOW if error.refused else "issuer_unavailable"


def _records(login: Login) -> Records:
    return login.refresh_error, login.refresh_try, login.asked


def _mark(login: Login) -> str:
    # A login without a refresh token is not refreshed: see `decide`.
    assert login.refresh_token is not None
    return fingerprint(login.refresh_token)
