"""When the refresh token is spent: the refresher's decisions, without a clock, file or network of their own.

Two clocks come in as arguments. `now` is unix time: tokens expire by it, and it may jump. `uptime` is seconds on
a clock that only runs forward, also while the machine sleeps: waits are measured by it.

Failures are of three kinds. Nothing was spent (no connection, or a definite answer): again, with backoff. Sent,
but no whole answer came: the refresh token may be spent, and presenting a spent one makes xAI revoke the whole
login, so it is tried a few times while a grace may last, and then only when there is nothing left to lose.
Refused: never again.
"""

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
STANDING_WAIT = 300.0  # seconds after a refusal of client or plan, which heals by itself or not at all
LOST_TRIES, LOST_WINDOW = 3, 30.0  # tries, and seconds from the first of them, when answers are lost
ASKED_WAIT, ASKED_WAIT_LIMIT = 120.0, 3600.0  # seconds between two refreshes that upstream's refusals ask for

ANSWER_LOST = "answer_lost"  # the code of a refresh_error
UPSTREAM_REFUSES = "upstream_refuses"


class Decision(enum.Enum):
    NOTHING = "nothing"
    REFRESH = "refresh"
    DECLINE = "decline"  # upstream refuses the token, but it is too early for another


class Schedule:
    """What is remembered from one look at the login to the next, in memory only."""

    def __init__(self, skew: float, random: Callable[[], float] = random.random):
        self._skew = skew
        self._random = random
        self._asked_wait = 0.0
        self._asked_not_before = -math.inf
        self._begin(None)

    def _begin(self, login: "tokens.Tokens | None") -> None:
        self._known = login and (login.access_token, login.refresh_token)
        self.failures = 0
        self._not_before = -math.inf
        self._terminal = False
        self._lost = 0
        self._lost_since: "float | None" = None
        self._declined = False

    def watch(self, login: tokens.Tokens, now: float) -> bool:
        """Forget what was about another login than this one; return whether it is new to us."""
        if self._known == (login.access_token, login.refresh_token):
            return False
        self._begin(login)
        self._asked_wait, self._asked_not_before = 0.0, -math.inf
        error = login.refresh_error
        if error is not None and error.code == ANSWER_LOST and not 0 <= now - error.at <= LOST_WINDOW:
            self._lost_since = -math.inf  # before this process began
        return True

    def decide(self, login: tokens.Tokens, asked: bool, now: float, uptime: float) -> Decision:
        """`asked`: upstream has refused this login's access token."""
        terminal = self._terminal or login.refresh_error is not None and login.refresh_error.terminal
        if terminal or login.refresh_token is None or uptime < self._not_before:
            return Decision.NOTHING
        state = login.state(now, self._skew)
        if state is tokens.State.INVALID or state is tokens.State.STALE and not self._may_be_spent(uptime):
            return Decision.REFRESH
        if asked and uptime >= self._asked_not_before:
            return Decision.REFRESH
        if asked and login.refresh_error is None and not self._declined:
            return Decision.DECLINE
        return Decision.NOTHING

    def declined(self, uptime: float) -> float:
        """Take note that it was said; return the seconds until another refresh is allowed."""
        self._declined = True
        return self._asked_not_before - uptime

    def hurry(self) -> None:
        """Wait no longer."""
        self._not_before = -math.inf

    def failed(self, error: errors.Error, login: tokens.Tokens, began: float, now: float,
               uptime: float) -> "float | None":
        """Return the seconds until the next try, or None when there is to be none while all stays as it is.

        `began`: the uptime at which the try began.
        """
        self.failures += 1
        if isinstance(error, errors.GrantRefused):
            self._terminal = True
            return None
        wait = self._wait_after(error, max(0.0, login.expires_at - now))
        self._not_before = uptime + wait
        if isinstance(error, errors.IssuerUnavailable) and error.sent:
            self._lost += 1
            self._lost_since = began if self._lost_since is None else self._lost_since
        expired = login.state(now, self._skew) is tokens.State.INVALID
        return None if self._may_be_spent(self._not_before) and not expired else wait

    def succeeded(self, login: tokens.Tokens, asked: bool, now: float, uptime: float) -> "float | None":
        """Take note of the new login; return the seconds to the next try if it is stale already: a failure.

        `asked`: upstream had refused the access token that it succeeds.
        """
        failures = self.failures
        self._begin(login)
        if asked:
            self._asked_wait = min(2 * self._asked_wait or ASKED_WAIT, ASKED_WAIT_LIMIT)
            self._asked_not_before = uptime + self._asked_wait
        else:
            self._asked_wait = 0.0  # the last token was not refused: it has lasted
        if login.state(now, self._skew) is tokens.State.FRESH:
            return None
        self.failures = failures + 1
        self._not_before = uptime + (wait := self._backoff())
        return wait

    def _may_be_spent(self, uptime: float) -> bool:
        """Whether the refresh token may be spent and it is too late for the issuer to overlook that."""
        return self._lost_since is not None and (
            self._lost >= LOST_TRIES or uptime > self._lost_since + LOST_WINDOW)

    def _wait_after(self, error: errors.Error, left: float) -> float:
        """`left`: seconds until the access token expires."""
        if isinstance(error, (errors.NotEntitled, errors.ClientRejected)):
            return STANDING_WAIT
        if not isinstance(error, errors.IssuerUnavailable):
            return min(self._backoff(), left + EXPIRED_LIMIT)
        longest = BACKOFF_LIMIT if error.sent else left + EXPIRED_LIMIT
        return max(min(self._backoff(), longest), min(error.retry_after or 0.0, RETRY_AFTER_LIMIT))

    def _backoff(self) -> float:
        """1, 2, 4 … 60 seconds, each shortened by up to a half so that many of us do not come at once."""
        return min(BACKOFF * 2 ** min(self.failures - 1, 16), BACKOFF_LIMIT) * (1 - self._random() / 2)
