"""The refresher's loop: keeps the login alive, and alone spends the refresh token.

Each turn polls the file, the clock and the proxy's request; schedule.py decides, and renewal.py
does what is due, under the lock and after the file was read again. A change must keep these rules:

1. The handlers of SIGTERM, SIGINT and SIGHUP only set flags for the loop. (signal.sigtimedwait,
   which would need no handlers, returns garbage in place of a signal after SIGSTOP and SIGCONT.)
2. An unusable login is a state to wait in, not a reason to exit: supervisord would end in FATAL.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xaiproxy import config, errors, judgement, kernel, token_folder, token_writer, tokens
from xaiproxy.refresher import lock_proof
from xaiproxy.refresher.notifier import Notifier
from xaiproxy.refresher.published_secret import PublishedSecret
from xaiproxy.refresher.publisher import Publisher, target_of
from xaiproxy.refresher.renewal import Renewal
from xaiproxy.refresher.report import Report, date, next_try
from xaiproxy.refresher.runtime import Ending, Runtime
from xaiproxy.refresher.schedule import Decision, Schedule
from xaiproxy.refresher.target import Target
from xaiproxy.token_store import TokenStore
from xaiproxy.tokens import Login, fingerprint

if TYPE_CHECKING:
    from xaiproxy.refresher.ask_listener import AskListener

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.25  # seconds; the proxy waits for the refresher
LOCK_TIMEOUT = 60.0  # seconds: longer than any try of another process takes


class Refresher:
    """`target`: what the login is published in; by default, what the settings name."""

    def __init__(
        self,
        settings: config.Config,
        *,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = kernel.uptime,
        sleep: Callable[[float], object] = time.sleep,
        target: Target | None = None,
    ):
        self.settings = settings
        self.store = TokenStore(settings)
        self._runtime = Runtime(clock, uptime, sleep)
        self._schedule = Schedule(settings.refresh_skew)
        notifier = Notifier(settings, self.store, self._runtime) if settings.notify_url else None
        self._report = Report(self.store, self._runtime, notifier)
        target = target or target_of(settings)
        self._secret = target if isinstance(target, PublishedSecret) else None
        self._renewal = Renewal(
            settings, self.store, self._schedule, self._report, self._runtime, self._secret
        )
        self._publisher = Publisher(target, self._report, self._runtime)
        self._listener: AskListener | None = None
        self._seen: Login | None = None

    def run(self) -> int:
        logger.info("started; the login of %s is kept in %s", self.settings.issuer, self.store.path)
        if self.settings.ask_bind is not None:
            # It imports prometheus_client, which no other refresher needs.
            from xaiproxy.refresher.ask_listener import AskListener

            self._listener = AskListener(self.settings, self.settings.ask_bind)
        self.begin()
        while not self._runtime.ending:
            self.turn()
        if self._listener is not None:
            self._listener.close()
        self._report.close()
        logger.info("ended")
        return 0

    def once(self) -> int:
        """Check the login once. Raises Error, whose exit code is the command's."""
        self._report.once = True
        self.begin()
        login = self.store.load()
        if login.refresh_token is not None:
            self._check()
            self._publish()
            if self._renewal.failure is not None:
                raise self._renewal.failure
            login = self.store.load()
        if self._runtime.ending:
            return errors.EXIT_INTERRUPTED
        error, now = login.refresh_error, self._runtime.now()
        found = self._report.judge(login, now)
        if error is not None and found.verdict is judgement.Verdict.ENDED:
            raise errors.GrantRefused(error.code, message=error.description)
        if found.ready:
            return 0
        if error is not None and error.code != tokens.UPSTREAM_REFUSES:
            raise errors.IssuerUnavailable(
                f"the access token in {self.store.path} has expired, and was not renewed: "
                f"{error.description}; {next_try(error, now)}"
            )
        raise errors.LoginUnusable(
            "expired", f"the access token in {self.store.path} has expired; {errors.SIGN_IN}"
        )

    def on_signal(self, number: int, _frame: object = None) -> None:
        """SIGHUP: try again now. Any other: end as soon as nothing can be lost by it."""
        if number == signal.SIGHUP:
            self._schedule.hurry()
        else:
            self._runtime.ending = True

    # The loop

    def begin(self) -> None:
        """Make the folder, and adopt the left-over of a killed writer."""
        self._report.update()
        # If another process holds the lock, it has done so.
        with contextlib.suppress(errors.LockBusy):
            try:
                token_folder.prepare(self.store)
                with token_writer.locked(self.store, 0):
                    pass
            except errors.StorageError as error:
                self._report.unwritable(error)

    def turn(self) -> None:
        """Write a heartbeat, check the login, do what follows, publish it, and pause."""
        self._report.beat()
        self._check()
        self._publish()
        self._report.notify()
        if self._listener is not None:
            self._listener.poll()
        self._runtime.pause(POLL_INTERVAL)

    def _check(self) -> None:
        try:
            login = self.store.current()
        except errors.LoginUnusable as error:
            self._report.log("login", str(error))
            return
        if login.refresh_token is None:
            self._report.log(
                "login",
                f"{self.store.path} holds no refresh token, so its login is not renewed, but used "
                "as it is until it expires; whatever put the file there has to replace it",
            )
            return
        self._report.log("login", "")
        if login is not self._seen:
            self._seen = login
            self._report.log("mode", token_folder.tighten(self.store))
        self._renewal.failure = None
        if self._decide(login) is not Decision.NOTHING:
            self._act(login)
            if self._renewal.failure is None:
                return
        self._report.outage(login)

    def _publish(self) -> None:
        """Publish what the file holds by now, which is on the disk."""
        with contextlib.suppress(errors.LoginUnusable):
            self._publisher.poll(self.store.current())

    def _decide(self, login: Login) -> Decision:
        if self._schedule.watch(login, self._runtime.now(), self._runtime.uptime()):
            mark = fingerprint(login.access_token)
            self._report.update(login=mark, result="", reason="", next_try=None, no_room="")
            self._report.log("failure", "")
            error = login.refresh_error
            if error is not None and error.terminal:
                self._report.log("login", error.description)
            else:
                logger.info(
                    "signed in%s; the access token lasts until %s",
                    f" as {login.account}" if login.account else "",
                    date(login.expires_at),
                )
        return self._schedule.decide(
            login, self.store.is_asked(login), self._runtime.now(), self._runtime.uptime()
        )

    def _pause_for_lock(self, seconds: float) -> None:
        self._report.beat()
        self._report.notify()
        self._runtime.pause(seconds)
        self._runtime.check_ending()

    def _exclusion(self) -> contextlib.AbstractContextManager[None]:
        """Exclude refreshers on other machines; a claim in a Secret does that without more."""
        if self._secret is not None:
            return contextlib.nullcontext()
        return lock_proof.proven(
            self.store, self.settings.instance, self._runtime.pause, self._runtime.now
        )

    def _act(self, login: Login) -> None:
        try:
            with token_writer.locked(
                self.store, LOCK_TIMEOUT, self._pause_for_lock, self._runtime.uptime
            ) as writer:
                self._report.log("lock", "")
                # Another process may have refreshed it meanwhile.
                login = self.store.load()
                decision = self._decide(login)
                if decision is Decision.NOTHING:
                    return
                with self._exclusion():
                    if decision is Decision.REFRESH:
                        self._renewal.refresh(writer, login)
                    else:
                        self._renewal.decline(writer, login)
        except errors.LoginUnusable as error:
            self._renewal.failure = error
            # The next poll finds any other state as well.
            if error.state == "replaced":
                self._report.update(no_room="")
                logger.warning("%s", error)
        except errors.LockBusy as error:
            self._renewal.failure = error
            self._report.update(result="locked", reason=str(error))
            self._report.log("lock", str(error))
        except (errors.StorageError, errors.NotClaimed) as error:
            # Without a record in the file: a process that has no lock must not write it.
            self._renewal.failed(error, login)
        except Ending:
            pass
