"""What the refresher reports: its heartbeat, its status file, and a log that repeats nothing."""

import contextlib
import dataclasses
import datetime
import logging
import math
from typing import Any

from xaiproxy import errors, judgement, refresher_status, token_lock, tokens
from xaiproxy.refresher.notifier import Notifier
from xaiproxy.refresher.runtime import Runtime
from xaiproxy.refresher.schedule import BACKOFF_LIMIT
from xaiproxy.token_store import ALIVE, TokenStore

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 10.0  # seconds
ERROR_INTERVAL = 60.0  # seconds between two error lines while no request can be served


class Report:
    """`once`: whether this is --once, which reports by its exit status instead.

    `notifier`: None without XAI_PROXY_NOTIFY_URL.
    """

    def __init__(self, store: TokenStore, runtime: Runtime, notifier: Notifier | None = None):
        self.once = False
        self.status = refresher_status.Status(runtime.now())
        self._store = store
        self._runtime = runtime
        self._notifier = notifier
        self._next_beat = -math.inf
        # The unix time minus the uptime, at the last heartbeat.
        self._clock_offset = math.inf
        # What was logged last about each subject.
        self._logged: dict[str, str] = {}
        self._next_error = -math.inf

    def beat(self, at_once: bool = False) -> None:
        """Write a heartbeat and the status if that is due, `at_once`, or after a clock step."""
        uptime = self._runtime.uptime()
        offset = self._runtime.now() - uptime
        # After a clock step the last heartbeat looks hours old, as if the refresher were gone.
        clock_was_set = abs(offset - self._clock_offset) > HEARTBEAT_INTERVAL
        if self.once or (not (at_once or clock_was_set) and uptime < self._next_beat):
            return
        self._next_beat, self._clock_offset = uptime + HEARTBEAT_INTERVAL, offset
        self.update()
        try:
            token_lock.beat(self._store)
        except errors.StorageError as error:
            self.unwritable(error)
            return
        if self._logged.get("folder"):
            self.update(no_room="")
        self.log("folder", "")

    def update(self, refresh: str = "", **changes: Any) -> None:
        """Write the status file, with `changes` to the status.

        `refresh`: the result of a refresh, which is counted; "" if there was none.
        """
        status = dataclasses.replace(self.status, at=self._runtime.now(), **changes)
        # Another process may count as well, and this one cannot always write.
        lasting = refresher_status.lasting(self._store, status)
        if refresh:
            lasting["refreshes"][refresh] += 1
        self.status = dataclasses.replace(status, **lasting)
        if not self.once:
            refresher_status.write(self._store, self.status)
        elif refresh or "publish_failure" in changes:
            # The rest of the file is about the refresher that runs, if any.
            filed = refresher_status.filed(self._store)
            refresher_status.write(self._store, dataclasses.replace(filed, **lasting))

    def notify(self) -> None:
        """Notify a person of what the last poll has found, if that is due."""
        if self._notifier is not None and not self.once:
            self._notifier.poll(self.status)

    def close(self) -> None:
        """Make the last heartbeat so old that the refresher counts as gone at once."""
        with contextlib.suppress(errors.StorageError):
            token_lock.beat(self._store, ALIVE)
        if self._notifier is not None:
            self._notifier.close()

    def log(self, subject: str, text: str, kind: str = "") -> None:
        """Log `text`, unless the last line about the subject was the same, or of the same kind.

        `text`: "" if there is nothing to log, so that the next line is logged in any case.
        """
        kind = text and (kind or text)
        is_exit_message = self.once and subject in ("login", "lock", "folder", "failure")
        if text and kind != self._logged.get(subject) and not is_exit_message:
            logger.warning("%s", text)
        self._logged[subject] = kind

    def unwritable(self, error: errors.StorageError) -> None:
        """Report that the token folder cannot be written, unless its login is never renewed."""
        try:
            # It may be a mounted Secret.
            if self._store.current().refresh_token is None:
                return
        except errors.LoginUnusable:
            pass
        self.update(no_room=str(error))
        self.log("folder", self._logged.get("folder") or str(error))

    def failure(self, error: errors.Error, record: tokens.RefreshError, now: float) -> None:
        """Log a failed try, unless it is one more of the same outage."""
        # The cause may differ each minute: the first one is logged, the file has the last one.
        kind = "outage" if isinstance(error, errors.IssuerUnavailable) else record.code
        waiting, plain = _is_late(record, now), record.description == str(error)
        self.log(
            "failure",
            f"the login could not be refreshed: {record.description}; {next_try(record, now)}",
            f"{kind} {record.terminal} {waiting} {plain}",
        )

    def judge(self, login: tokens.Login, now: float) -> judgement.Judgement:
        """The judgement of a login whose refresher is this process."""
        return judgement.judge(login, now, 0.0, False, self.status)

    def outage(self, login: tokens.Login) -> None:
        """Log an error while a failing renewal keeps requests from being served."""
        found = self.judge(login, self._runtime.now())
        failing = login.refresh_error is not None or self.status.failure or self.status.no_room
        if found.ready or self.once:
            self._next_error = -math.inf
        elif failing and self._runtime.uptime() >= self._next_error:
            self._next_error = self._runtime.uptime() + ERROR_INTERVAL
            logger.error("requests cannot be served: %s", found.reason)


def next_try(error: tokens.RefreshError, now: float) -> str:
    if error.retry_at is None:
        return "no further try"
    if _is_late(error, now):
        return (
            f"the refresh token may be spent: next try at {date(error.retry_at)}, or when the "
            "access token is refused"
        )
    return f"next try in {math.ceil(error.retry_at - now)} s"


def _is_late(error: tokens.RefreshError, now: float) -> bool:
    """Whether the next try is the late one of a refresh token that may be spent."""
    return error.code == tokens.ANSWER_LOST and (error.retry_at or 0.0) > now + BACKOFF_LIMIT


def date(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
