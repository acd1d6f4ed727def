"""Process 2, by hand or under supervisord: keeps the login alive. The only one that spends the refresh token.

Four times a second it looks at the file, the clock and the proxy's note; schedule.py decides. A try then is: take
the lock, read the file again, find the token endpoint, rehearse the save, send the refresh token, save the answer.
The rules that a change must keep:

1. From sending the refresh token until its successor is on the disk nothing ends this process but SIGKILL: the
   handlers of SIGTERM, SIGINT and SIGHUP only set what the loop looks at. (signal.sigtimedwait, which would need
   no handlers, returns garbage in place of a signal after SIGSTOP and SIGCONT.)
2. A login that cannot be used is a state to wait in, not a reason to exit: supervisord would give up on us.
3. What fails is recorded in the file, where the proxy and `xai-login --status` find it.
"""

import contextlib
import dataclasses
import datetime
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from xaiproxy import (
    command,
    config,
    errors,
    judgement,
    log,
    refresher_status,
    token_lock,
    token_store,
    token_writer,
    tokens,
)
from xaiproxy.oauth import discovery, session, token_endpoint
from xaiproxy.refresher.schedule import BACKOFF_LIMIT, REFUSED_FOR_NOW, Decision, Schedule

logger = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks; the proxy waits for us
REPEAT = 60.0  # seconds between two error lines while no request can be served
BEAT = 10.0  # seconds between two signs of life
DEADLINE = 30.0  # seconds for the whole exchange that spends the refresh token
DISCOVERY_DEADLINE = 10.0  # seconds; with DEADLINE and BEAT still less than token_store.ALIVE
LOCK_WAIT = 60.0  # seconds: longer than any try of another process takes
SAVE_AGAIN = 1.0  # seconds between two attempts to save what is only in memory

EXAMPLES = """\
  xai-refresher         keep the login alive until told to stop; SIGHUP: try again now
  xai-refresher --once  look once, refresh the login if that is due, and end; for cron

Exit status of --once: 0 the login is good; 69 the issuer cannot be reached; 75 the token file cannot be
written or is locked; 77 signed out, or refused; 78 wrong settings; 130 interrupted.
"""


def uptime() -> float:
    """Seconds since the machine started, with those in which it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Ending(Exception):
    """We were told to end while we waited for the lock."""


class Refresher:
    def __init__(
        self,
        settings: config.Config,
        *,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = uptime,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self.settings = settings
        self.store = token_store.TokenStore(settings)
        self._web = session.Session(settings)
        self._schedule = Schedule(settings.refresh_skew)
        self._clock = clock
        self._uptime = uptime
        self._sleep = sleep
        self._ending = False
        self._once = False
        self._failure: errors.Error | None = None  # of the latest try
        self._seen: tokens.Tokens | None = None
        self._endpoint_in_doubt = False
        self._next_beat = -math.inf
        self._clock_offset = math.inf  # of the time of day to the uptime, at the last sign of life
        self._said: dict[str, str] = {}
        self._next_error = -math.inf  # uptime
        self._status = refresher_status.Status(clock())

    def run(self) -> int:
        logger.info("started; the login of %s is kept in %s", self.settings.issuer, self.store.path)
        self.begin()
        while not self._ending:
            self.turn()
        logger.info("ended")
        return 0

    def once(self) -> int:
        """One look. Raises Error, whose exit code is the command's."""
        self._once = True
        self.begin()
        login = self.store.load()
        if login.refresh_token is not None:
            self._look()
            if self._failure is not None:
                raise self._failure
            login = self.store.load()
        if self._ending:
            return errors.EXIT_INTERRUPTED
        error, now = login.refresh_error, self._clock()
        if error is not None and error.terminal:
            raise errors.GrantRefused(error.code, message=error.description)
        if login.state(now, self.settings.refresh_skew) is tokens.State.INVALID:
            if error is not None and error.code != tokens.UPSTREAM_REFUSES:
                raise errors.IssuerUnavailable(
                    f"the access token in {self.store.path} has expired, and was not renewed: "
                    f"{error.description}; {_next_try(error, now)}"
                )
            raise errors.LoginUnusable(
                "expired", f"the access token in {self.store.path} has expired; {errors.SIGN_IN}"
            )
        return 0

    def on_signal(self, number: int, _frame: Any = None) -> None:
        """SIGHUP: try again now. Any other: end when nothing can be lost by it."""
        if number == signal.SIGHUP:
            self._schedule.hurry()
        else:
            self._ending = True

    # Looking

    def begin(self) -> None:
        """Make the folder, and put what a killed writer left behind into place."""
        self._publish()
        try:
            token_writer.prepare_folder(self.store)
            with token_writer.locked(self.store, 0):
                pass
        except errors.LockBusy:
            pass  # who has the lock has done so
        except errors.StorageError as error:
            self._say_unwritable(error)

    def turn(self) -> None:
        """One turn of the loop: a sign of life, a look, and what follows from it, and a pause."""
        self._beat()
        self._look()
        self._pause(TICK)

    def _look(self) -> None:
        try:
            login = self.store.current()
        except errors.LoginUnusable as error:
            self._say("login", str(error))
            return
        if login.refresh_token is None:
            self._say(
                "login",
                f"{self.store.path} holds no refresh token, so its login is not renewed, but used "
                "as it is until it expires; whoever puts the file there has to replace it",
            )
            return
        self._say("login", "")
        if login is not self._seen:
            self._seen = login
            self._say("mode", token_writer.tighten(self.store))
        self._failure = None
        if self._decide(login) is not Decision.NOTHING:
            self._act(login)
            if self._failure is None:
                return
        self._tell_outage(login)

    def _decide(self, login: tokens.Tokens) -> Decision:
        if self._schedule.watch(login, self._clock(), self._uptime()):
            self._publish(
                login=tokens.fingerprint(login.access_token),
                result="",
                reason="",
                next_try=None,
                no_room="",
            )
            self._say("failure", "")
            error = login.refresh_error
            if error is not None and error.terminal:
                self._say("login", error.description)
            else:
                logger.info(
                    "signed in%s; the access token lasts until %s",
                    f" as {login.account}" if login.account else "",
                    _date(login.expires_at),
                )
        return self._schedule.decide(login, self._asked(login), self._clock(), self._uptime())

    def _asked(self, login: tokens.Tokens) -> bool:
        return self.store.asked_for() == tokens.fingerprint(login.access_token)

    # Acting

    def _act(self, login: tokens.Tokens) -> None:
        try:
            with token_writer.locked(
                self.store, LOCK_WAIT, self._pause_for_lock, self._uptime
            ) as writer:
                self._say("lock", "")
                login = self.store.load()  # another process may have done it meanwhile
                decision = self._decide(login)
                if decision is Decision.REFRESH:
                    self._refresh(writer, login)
                elif decision is Decision.DECLINE:
                    self._decline(writer, login)
        except errors.LoginUnusable as error:
            self._failure = error
            if error.state == "replaced":  # any other state is found by the next poll as well
                self._publish(no_room="")
                logger.warning("%s", error)
        except errors.LockBusy as error:
            self._failure = error
            self._publish(result="locked", reason=str(error))
            self._say("lock", str(error))
        except errors.StorageError as error:
            self._failed(error, login)
        except Ending:
            pass

    def _refresh(self, writer: token_writer.TokenWriter, login: tokens.Tokens) -> None:
        begun = reserved = None
        try:
            located = self._with_token_endpoint(login)
            self._beat(at_once=True)  # the last for up to 30 s
            self._check_ending()
            asked = self._asked(login)
            begun = self._schedule.begun(located, asked, self._clock(), self._uptime())
            reserved = writer.rehearse(begun)
            self._check_ending()
            successor = token_endpoint.refresh(
                self._web, begun.token_endpoint, begun, deadline=DEADLINE, now=self._clock
            )
        except Ending:
            if reserved is not None:
                reserved.discard()
                self._record(writer, login, self._schedule.withdrawn(login, self._clock()))
            raise
        except (errors.OAuthError, errors.IssuerUnavailable, errors.StorageError) as error:
            if reserved is not None:
                reserved.discard()
            if (
                isinstance(error, errors.GrantRefused)
                and self.store.load().refresh_token != login.refresh_token
            ):
                return  # a program that takes no lock has put another one there, which the next poll finds
            self._failed(error, login, begun, writer)
        else:
            self._save(reserved, begun, successor, asked)

    def _check_ending(self) -> None:
        if self._ending:
            raise Ending

    def _with_token_endpoint(self, login: tokens.Tokens) -> tokens.Tokens:
        """The login with an endpoint to trust: the remembered one, unless it is in doubt, or a discovered one."""
        try:
            discovery.check_endpoint(login.issuer, login.token_endpoint)
            remembered = login
        except errors.IssuerUnavailable:
            remembered = None
        if remembered is not None and not self._endpoint_in_doubt:
            return login
        try:
            endpoint = discovery.discover(
                self._web, login.issuer, deadline=DISCOVERY_DEADLINE
            ).token_endpoint
        except errors.IssuerUnavailable:
            if remembered is None:
                raise
            return login
        return dataclasses.replace(login, token_endpoint=endpoint)

    def _save(
        self,
        reserved: token_writer.Reserved,
        begun: tokens.Tokens,
        successor: tokens.Tokens,
        asked: bool,
    ) -> None:
        # Until commit has written it the new login is in this process only: nothing that could fail comes first.
        self._endpoint_in_doubt = False
        failures = self._schedule.failures
        successor = self._schedule.succeeded(successor, begun, asked, self._clock(), self._uptime())
        while True:
            try:
                reserved.commit(successor)
                break
            except errors.StorageError as error:
                self._publish(no_room="" if reserved.renamed else str(error))
                self._say(
                    "unsaved",
                    str(error)
                    if reserved.renamed
                    else f"the refreshed login is in this process's memory only: do not end it. {error}",
                )
            self._beat()
            self._pause(SAVE_AGAIN)
        self._say("unsaved", "")
        self._publish(
            login=tokens.fingerprint(successor.access_token),
            result=refresher_status.OK,
            reason="",
            next_try=None,
            no_room="",
        )
        logger.info(
            "refreshed%s; the access token lasts until %s",
            f" after {failures} failures" if failures else "",
            _date(successor.expires_at),
        )
        self._say(
            "failure",
            successor.refresh_error.description if successor.refresh_error else "",
            "stale",
        )
        if self._asked(begun):
            with contextlib.suppress(OSError):
                self.store.refused_path.unlink()

    def _decline(self, writer: token_writer.TokenWriter, login: tokens.Tokens) -> None:
        now, uptime = self._clock(), self._uptime()
        text = (
            "the API refuses access tokens soon after they are made; the next is asked for at "
            + _date(now + self._schedule.asked_wait(uptime))
        )
        logger.warning("%s", text)
        self._record(writer, login, self._schedule.declined(login, text, now, uptime))

    def _failed(
        self,
        error: errors.Error,
        login: tokens.Tokens,
        begun: tokens.Tokens | None = None,
        writer: token_writer.TokenWriter | None = None,
    ) -> None:
        """Decide about the next try, and tell. Without a writer there is no lock, and nothing is recorded.

        `login` and `begun`: before the try, and as the file has had it since the refresh token may have been sent.
        """
        self._failure = error
        now = self._clock()
        recorded = self._schedule.failed(error, _code(error), login, begun, now, self._uptime())
        record = recorded.refresh_error
        # It may have moved. When an answer was lost it has not, and each second counts.
        self._endpoint_in_doubt = isinstance(error, errors.IssuerUnavailable) and (
            not error.sent or error.page
        )
        # An outage may have a new face every minute: its first one is logged, and the file has the latest.
        kind = "outage" if isinstance(error, errors.IssuerUnavailable) else record.code
        self._publish(
            result=record.code,
            reason=record.description,
            next_try=record.retry_at,
            **({"no_room": str(error)} if isinstance(error, errors.StorageError) else {}),
        )
        self._say(
            "failure",
            f"the login could not be refreshed: {record.description}; {_next_try(record, now)}",
            f"{kind} {record.terminal} {_is_waiting(record, now)} {record.description == str(error)}",
        )
        if writer is not None:
            self._record(writer, login, recorded)

    def _record(
        self, writer: token_writer.TokenWriter, login: tokens.Tokens, recorded: tokens.Tokens
    ) -> None:
        if self.store.load().refresh_token != login.refresh_token:
            return  # a program that takes no lock has put another login there, which must stay
        try:
            writer.save(recorded, over=login)
            self._publish(no_room="")
        except (
            errors.StorageError
        ) as failure:  # a full disk: the login is unharmed, and we know in memory
            self._publish(no_room=str(failure))

    # Waiting and telling

    def _pause_for_lock(self, seconds: float) -> None:
        self._beat()
        self._pause(seconds)
        if self._ending:
            raise Ending

    def _pause(self, seconds: float) -> None:
        log.flush()  # nothing else wakes lines that wait for room
        self._sleep(seconds)

    def _beat(self, at_once: bool = False) -> None:
        uptime = self._uptime()
        offset = self._clock() - uptime
        # Once the clock was set, our last sign looks like that of another hour, and we like one who is gone.
        clock_was_set = abs(offset - self._clock_offset) > BEAT
        if self._once or (not (at_once or clock_was_set) and uptime < self._next_beat):
            return
        self._next_beat, self._clock_offset = uptime + BEAT, offset
        self._publish()
        try:
            token_lock.beat(self.store)
            if self._said.get("folder"):
                self._publish(no_room="")
            self._say("folder", "")
        except errors.StorageError as error:
            self._say_unwritable(error)

    def _publish(self, **changes: Any) -> None:
        """Write the refresher's own status, with what has changed."""
        self._status = dataclasses.replace(self._status, at=self._clock(), **changes)
        if not self._once:
            refresher_status.write(self.store, self._status)

    def _tell_outage(self, login: tokens.Tokens) -> None:
        """Log an error as soon as a failing renewal keeps requests from being served, and each minute while it lasts."""
        found = judgement.judge(login, self._clock(), 0.0, False, self._status)
        failing = login.refresh_error is not None or self._status.failure or self._status.no_room
        if found.ready or self._once:
            self._next_error = -math.inf
        elif failing and self._uptime() >= self._next_error:
            self._next_error = self._uptime() + REPEAT
            logger.error("requests cannot be served: %s", found.reason)

    def _say_unwritable(self, error: errors.StorageError) -> None:
        with contextlib.suppress(errors.LoginUnusable):
            if self.store.current().refresh_token is None:
                return  # a mounted Secret: there is nothing that we would write
        self._publish(no_room=str(error))
        self._say("folder", self._said.get("folder") or str(error))

    def _say(self, subject: str, text: str, kind: str = "") -> None:
        """Log `text` unless the same, or the same kind, was said last about the subject; "" is nothing to say."""
        kind = text and (kind or text)
        told_by_exit = self._once and subject in ("login", "lock", "folder", "failure")
        if text and kind != self._said.get(subject) and not told_by_exit:
            logger.warning("%s", text)
        self._said[subject] = kind


def _code(error: errors.Error) -> str:
    if isinstance(error, errors.OAuthError):
        return error.error
    if isinstance(error, errors.IssuerUnavailable):
        return (
            tokens.ANSWER_LOST
            if error.sent
            else REFUSED_FOR_NOW
            if error.refused
            else "issuer_unavailable"
        )
    return "storage"


def _is_waiting(error: tokens.RefreshError, now: float) -> bool:
    """Whether the next try waits for the end of the access token, since the refresh token may be spent."""
    return (
        error.code == tokens.ANSWER_LOST
        and error.retry_at is not None
        and error.retry_at > now + BACKOFF_LIMIT
    )


def _next_try(error: tokens.RefreshError, now: float) -> str:
    if error.retry_at is None:
        return "no further try"
    if _is_waiting(error, now):
        return f"the refresh token may be spent: next try at {_date(error.retry_at)}, or when the access token is refused"
    return f"next try in {math.ceil(error.retry_at - now)} s"


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime(
        "%Y-%m-%d %H:%M:%S UTC"
    )


def main(argv: list[str] | None = None) -> int:
    parser = command.ArgumentParser(prog="xai-refresher", description=EXAMPLES)
    parser.add_argument("--once", action="store_true", help="look once and end")
    parser.add_argument(
        "--token-path", metavar="FILE", help="the token file (default: XAI_PROXY_TOKEN_PATH)"
    )
    return command.run("xai-refresher", lambda: _main(parser.parse_args(argv)))


def _main(arguments: Any) -> int:
    settings = config.from_environ(os.environ, {"XAI_PROXY_TOKEN_PATH": arguments.token_path})
    log.setup("refresher", settings.log_level, settings.log_format)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    refresher = Refresher(settings)
    hangup = command.hangup()
    signal.signal(signal.SIGHUP, lambda *_: refresher.on_signal(hangup))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, refresher.on_signal)
    return refresher.once() if arguments.once else refresher.run()
