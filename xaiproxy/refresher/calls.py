"""Calls for a person: which one is due, by what a poll has found and what was delivered before.

Decisions without a clock, file or network. A call is due when a login has ended, when renewal has
failed for half of the time that the access token had left, and when either is over. A missing login
causes none: it is a new installation, or --logout.
"""

import dataclasses

from xaiproxy import errors, judgement, refresher_status, tokens
from xaiproxy.judgement import Verdict

SIGN_IN_NEEDED = "sign_in_needed"
RENEWAL_FAILING = "renewal_failing"
RECOVERED = "recovered"

# Seconds for which a token file must be unusable: a program may be in the middle of writing it.
SETTLE_TIME = 10.0


@dataclasses.dataclass(frozen=True)
class Trouble:
    """`about`: what it is about, so that a second trouble of its kind is another one.

    `expires_at`: of the access token, in unix seconds; None if there is no login.
    """

    event: str
    about: str
    message: str
    expires_at: float | None

    @property
    def name(self) -> str:
        return f"{self.event} {self.about}"

    def due(self, since: float) -> float:
        """Return when a call is due about a trouble that was first found at `since`."""
        if self.expires_at is None:
            return since + SETTLE_TIME
        if self.event == RENEWAL_FAILING:
            return since + max(0.0, self.expires_at - since) / 2
        return since


class Working:
    """The login is used, and no renewal of it is failing."""


# None: neither is certain.
Found = Trouble | Working | None


@dataclasses.dataclass(frozen=True)
class Call:
    """`at`: unix seconds at which it became due; the same each time it is sent.

    `about`: name of its trouble; "" for the end of one.
    """

    event: str
    message: str
    at: float
    about: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What is remembered across restarts, and by all refreshers of a token folder.

    `trouble`: name of the latest trouble; "" after its end. `since`: unix seconds at which either
    was first found.
    `called`: name of the trouble of the last call that was delivered; "" after its end was.
    """

    trouble: str = ""
    since: float = 0.0
    called: str = ""


def find(
    login: tokens.Login | errors.LoginUnusable,
    status: refresher_status.Status,
    now: float,
    skew: float,
) -> Found:
    """`status`: the refresher's own. `skew`: see Login.state."""
    if isinstance(login, errors.LoginUnusable):
        found = judgement.judge(login, now, 0.0, False, None)
        if found.verdict is not Verdict.UNUSABLE:
            return None
        return Trouble(SIGN_IN_NEEDED, "file", found.sentence, None)
    mark = tokens.fingerprint(login.access_token)
    own = status if status.login == mark else None
    found = judgement.judge(login, now, 0.0, False, own)
    if found.exit_code == errors.EXIT_SIGN_IN:
        return Trouble(SIGN_IN_NEEDED, mark, found.sentence, login.expires_at)
    failing = login.refresh_error or (own and (own.failure or own.no_room))
    if failing and found.verdict in (Verdict.FAILING, Verdict.NO_ROOM, Verdict.EXPIRED):
        return Trouble(RENEWAL_FAILING, mark, found.sentence, login.expires_at)
    # After a restart, a token whose renewal is due is no evidence: the renewal may fail again.
    lasts = login.refresh_token is None or login.state(now, skew) is tokens.State.FRESH
    if found.ready and lasts:
        return Working()
    return None


def plan(record: Record, found: Found, now: float) -> tuple[Record, Call | None]:
    """Return the record to keep, and the call that is due."""
    if found is None or (isinstance(found, Working) and not record.called):
        return (record if found is None else Record()), None
    name = found.name if isinstance(found, Trouble) else ""
    # The clock may have been set back.
    since = min(record.since, now) if record.trouble == name else now
    record = Record(name, since, record.called)
    if isinstance(found, Working):
        return record, Call(RECOVERED, "The login works again.", since, "")
    if record.called == name or now < found.due(since):
        return record, None
    return record, Call(found.event, found.message, found.due(since), name)


def delivered(record: Record, call: Call) -> Record:
    """Return the record after a delivery."""
    return dataclasses.replace(record, called=call.about)
