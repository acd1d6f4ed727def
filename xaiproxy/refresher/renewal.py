"""A try to refresh the login, with the lock held: the steps that docs/login-safety.md is about.

Their order is: find the token endpoint, rehearse the save, claim the refresh token where several
machines may hold it, send it, save the answer.
A change must keep these rules:

1. From sending the refresh token until its successor is on the disk, only SIGKILL ends the process:
   signals set a flag, which is checked before the token is sent and not again.
2. A failure is recorded in the file, where the proxy and `xai-login --status` find it.
"""

import contextlib
import dataclasses
import logging
from typing import Any

from xaiproxy import config, errors, refresher_status, tokens
from xaiproxy.oauth import discovery, session, token_endpoint
from xaiproxy.refresher.published_secret import PublishedSecret
from xaiproxy.refresher.report import Report, date
from xaiproxy.refresher.runtime import Ending, Runtime
from xaiproxy.refresher.schedule import LOST_TRIES, Schedule
from xaiproxy.token_store import TokenStore
from xaiproxy.token_writer import Reserved, TokenWriter
from xaiproxy.tokens import Login, fingerprint

logger = logging.getLogger(__name__)

DEADLINE = 30.0  # seconds for the whole exchange that spends the refresh token
# Seconds. With DEADLINE, HEARTBEAT_INTERVAL and the claim's deadline it must be less than
# token_store.ALIVE.
DISCOVERY_DEADLINE = 10.0
SAVE_INTERVAL = 1.0  # seconds between two attempts to save a login that is only in memory


class Renewal:
    """`failure`: of the latest try, if it failed. `secret`: where refresh tokens are claimed."""

    def __init__(
        self,
        settings: config.Config,
        store: TokenStore,
        schedule: Schedule,
        report: Report,
        runtime: Runtime,
        secret: PublishedSecret | None = None,
    ):
        self.failure: errors.Error | None = None
        self._web = session.Session(settings)
        self._store = store
        self._schedule = schedule
        self._report = report
        self._runtime = runtime
        self._secret = secret
        self._endpoint_in_doubt = False

    def refresh(self, writer: TokenWriter, login: Login) -> None:
        """Refresh `login`, which tokens.json holds.

        Raises Ending, and LoginUnusable if another program has replaced the login meanwhile.
        """
        begun = reserved = None
        try:
            endpoint = self._token_endpoint(login)
            # The last heartbeat for up to DEADLINE.
            self._report.beat(at_once=True)
            self._runtime.check_ending()
            asked = self._store.is_asked(login)
            located = dataclasses.replace(login, token_endpoint=endpoint)
            begun = self._schedule.begun(
                located, asked, self._runtime.now(), self._runtime.uptime()
            )
            reserved = writer.rehearse(begun)
            self._runtime.check_ending()
            if self._secret is not None:
                self._secret.claim(login, late=self._is_late(login))
            successor = token_endpoint.refresh(
                self._web, endpoint, begun, deadline=DEADLINE, now=self._runtime.now
            )
        except Ending:
            if reserved is not None:
                reserved.discard()
                self._record(writer, login, self._schedule.withdrawn(login, self._runtime.now()))
            raise
        except (
            errors.OAuthError,
            errors.IssuerUnavailable,
            errors.NotClaimed,
            errors.StorageError,
        ) as error:
            if reserved is not None:
                reserved.discard()
            # If another program has put another login there, the next poll finds that one.
            if isinstance(error, errors.GrantRefused) and not self._holds(login):
                return
            self.failed(error, login, begun, writer)
        else:
            self._save(reserved, begun, successor, asked)

    def _is_late(self, login: Login) -> bool:
        """Whether this try is the late one of a refresh token that may be spent."""
        return login.refresh_try is not None and login.refresh_try.tries >= LOST_TRIES

    def _holds(self, login: Login) -> bool:
        """Whether the file still holds this login; a program that takes no lock may replace it."""
        return self._store.load().refresh_token == login.refresh_token

    def _token_endpoint(self, login: Login) -> str:
        """Return the remembered endpoint, or if that is in doubt or invalid, a discovered one."""
        remembered = login.token_endpoint
        try:
            discovery.check_endpoint(login.issuer, remembered)
        except errors.IssuerUnavailable:
            remembered = None
        if remembered is not None and not self._endpoint_in_doubt:
            return remembered
        try:
            found = discovery.discover(self._web, login.issuer, deadline=DISCOVERY_DEADLINE)
        except errors.IssuerUnavailable:
            if remembered is None:
                raise
            return remembered
        return found.token_endpoint

    def _save(self, reserved: Reserved, begun: Login, successor: Login, asked: bool) -> None:
        # Until it is committed, the new login is in this process only: nothing that could fail
        # comes first.
        self._endpoint_in_doubt = False
        failures = self._schedule.failures
        successor = self._schedule.succeeded(
            successor, begun, asked, self._runtime.now(), self._runtime.uptime()
        )
        self._commit(reserved, successor)
        mark = fingerprint(successor.access_token)
        self._report.update(
            refresh=refresher_status.OK,
            login=mark,
            result=refresher_status.OK,
            reason="",
            next_try=None,
            no_room="",
        )
        logger.info(
            "refreshed%s; the access token lasts until %s",
            f" after {failures} failures" if failures else "",
            date(successor.expires_at),
        )
        error = successor.refresh_error
        self._report.log("failure", error.description if error else "", "stale")
        if self._store.is_asked(begun):
            with contextlib.suppress(OSError):
                self._store.refused_path.unlink()

    def _commit(self, reserved: Reserved, successor: Login) -> None:
        """Save the login, again and again if need be. Raises LoginUnusable if it was replaced."""
        while True:
            try:
                reserved.commit(successor)
                break
            except errors.StorageError as error:
                text = str(error)
                if not reserved.renamed:
                    text = (
                        "the refreshed login is in this process's memory only: do not end it. "
                        + text
                    )
                self._report.update(no_room="" if reserved.renamed else str(error))
                self._report.log("unsaved", text)
            self._report.beat()
            self._report.notify()
            self._runtime.pause(SAVE_INTERVAL)
        self._report.log("unsaved", "")

    def decline(self, writer: TokenWriter, login: Login) -> None:
        now, uptime = self._runtime.now(), self._runtime.uptime()
        text = (
            "the API refuses access tokens soon after they are issued; the next refresh may begin "
            f"at {date(now + self._schedule.asked_wait(uptime))}"
        )
        logger.warning("%s", text)
        self._record(writer, login, self._schedule.declined(login, text, now, uptime))

    def failed(
        self,
        error: errors.Error,
        login: Login,
        begun: Login | None = None,
        writer: TokenWriter | None = None,
    ) -> None:
        """Plan the next try, report the failure, and record it if there is a writer.

        `login`: as it was before the try. `begun`: as the file has had it since the rehearsal.
        """
        self.failure = error
        now = self._runtime.now()
        recorded, record = self._schedule.failed(error, login, begun, now, self._runtime.uptime())
        # The endpoint may have moved. Not so if an answer was lost: then each second counts.
        self._endpoint_in_doubt = isinstance(error, errors.IssuerUnavailable) and (
            not error.sent or error.page
        )
        self._report.failure(error, record, now)
        changes: dict[str, Any] = {
            "refresh": result_of(error, record),
            "result": record.code,
            "reason": record.description,
            "next_try": record.retry_at,
        }
        if isinstance(error, errors.StorageError):
            changes["no_room"] = str(error)
        if writer is None:
            self._report.update(**changes)
        else:
            self._record(writer, login, recorded, **changes)

    def _record(
        self,
        writer: TokenWriter,
        login: Login,
        recorded: Login,
        **changes: Any,
    ) -> None:
        """Save the records of a try over `login`; publish `changes`, and whether there was room."""
        try:
            if self._holds(login):
                writer.save(recorded, over=login)
                changes["no_room"] = ""
        except errors.StorageError as error:
            # A full disk: the login is unharmed, and the schedule knows the records.
            changes["no_room"] = str(error)
        finally:
            self._report.update(**changes)


def result_of(error: errors.Error, record: tokens.RefreshError) -> str:
    """Return which of refresher_status.RESULTS a failed refresh counts as."""
    if isinstance(error, errors.StorageError):
        return "disk"
    if isinstance(error, errors.IssuerUnavailable):
        return "refused_for_now" if error.refused else "unreachable"
    if isinstance(error, errors.NotEntitled):
        return "entitlement"
    return "ended" if record.terminal else "refused_for_now"
