"""Delivery of calls for a person to XAI_PROXY_NOTIFY_URL, in threads that hold up no refresh.

A delivery has succeeded when a 2xx status arrives; the response body is not read, and a redirect is
not followed. Any other outcome is retried every RETRY_INTERVAL seconds while the trouble lasts. A
call is delivered once, except if the process is killed, or the connection breaks, between the
receiver's response and its record: it is then sent again, with the same `at`.

No log line names more of the URL than scheme, host and port: the rest may be a secret.
"""

import dataclasses
import json
import logging
import math
import queue
import socket
import threading
import urllib.parse

import requests
import urllib3

from xaiproxy import __version__, config, errors, refresher_status, tokens, trust
from xaiproxy.oauth import causes
from xaiproxy.oauth.transport import Adapter
from xaiproxy.refresher import call_record, calls
from xaiproxy.refresher.runtime import Runtime
from xaiproxy.token_store import TokenStore

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds for each step of a delivery
RETRY_INTERVAL = 60.0  # seconds from a failed delivery to the next
BUSY_INTERVAL = 1.0  # seconds until the record is read again that another refresher has locked
END_TIMEOUT = 1.0  # seconds that the end of the process waits for a delivery
HEADERS = {"User-Agent": f"xaiproxy/{__version__}", "Content-Type": "application/json"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`unsaved`: whether the record file does not have `record`.

    `failure`: why `call` was not delivered, in a sentence; "" if it was.
    """

    record: calls.Record
    unsaved: bool
    call: calls.Call | None
    failure: str = ""


class Notifier:
    def __init__(self, settings: config.Config, store: TokenStore, runtime: Runtime):
        self._url = settings.notify_url
        parts = urllib.parse.urlsplit(self._url)
        self._origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._egress = settings.egress
        self._skew = settings.refresh_skew
        self._store = store
        self._runtime = runtime
        # As this process knows the record; None before it was first read.
        self._record: calls.Record | None = None
        self._unsaved = False
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._not_before = -math.inf
        # The event and trouble of the last failure in the log, and its text.
        self._logged: tuple[str, ...] = ()

    def poll(self, status: refresher_status.Status) -> None:
        """Log the last delivery's outcome, and start the next if a call is due. Never waits.

        `status`: the refresher's own.
        """
        self._finish()
        if self._thread is not None and self._thread.is_alive():
            return
        now, uptime = self._runtime.now(), self._runtime.uptime()
        if uptime < self._not_before:
            return
        found = calls.find(self._login(), status, now, self._skew)
        if self._record is not None:
            record, call = calls.plan(self._record, found, now)
            if call is None and record == self._record:
                return
        # Unless the thread reports something else.
        self._not_before = uptime + RETRY_INTERVAL
        self._thread = threading.Thread(target=self._work, args=(found, now), daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            self._log_failure(None, f"no thread can be started ({error})")

    def _login(self) -> tokens.Login | errors.LoginUnusable:
        try:
            return self._store.current()
        except errors.LoginUnusable as error:
            return error

    def close(self) -> None:
        """Give a delivery that is under way a moment to end."""
        if self._thread is not None:
            self._thread.join(END_TIMEOUT)
            self._finish()

    def _finish(self) -> None:
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            if outcome is None:
                self._not_before = self._runtime.uptime() + BUSY_INTERVAL
                continue
            self._record, self._unsaved = outcome.record, outcome.unsaved
            if outcome.failure:
                self._log_failure(outcome.call, outcome.failure)
                continue
            self._not_before = -math.inf
            if outcome.call is not None:
                logger.info("notified %s: %s", self._origin, outcome.call.event)

    def _log_failure(self, call: calls.Call | None, text: str) -> None:
        key = (call.event, call.about, text) if call is not None else (text,)
        if key != self._logged:
            self._logged = key
            logger.warning(
                "a call for a person (XAI_PROXY_NOTIFY_URL) was not delivered, and is tried again "
                "every %.0f s: %s",
                RETRY_INTERVAL,
                text,
            )

    # In the thread

    def _work(self, found: calls.Found, now: float) -> None:
        try:
            with call_record.locked(self._store) as file:
                record = None if self._unsaved else file.read()
                record = record or self._record or calls.Record()
                record, call = calls.plan(record, found, now)
                unsaved = not file.write(record)
                failure = self._deliver(call) if call is not None else ""
                if call is not None and not failure:
                    record = calls.delivered(record, call)
                    unsaved = not file.write(record)
            self._outcomes.put(Outcome(record, unsaved, call, failure))
        except call_record.Busy:
            self._outcomes.put(None)

    def _deliver(self, call: calls.Call) -> str:
        """Return why the call was not delivered, in a sentence; "" if it was."""
        body = {
            "event": call.event,
            "message": call.message,
            "at": int(call.at),
            "host": socket.gethostname(),
        }
        proxy = self._egress.proxy_for(self._origin)
        try:
            with requests.Session() as web:
                web.trust_env = False
                for scheme in ("https://", "http://"):
                    web.mount(scheme, Adapter(trust.context(self._egress)))
                web.headers = requests.structures.CaseInsensitiveDict(HEADERS)
                with web.post(
                    self._url,
                    data=json.dumps(body).encode(),
                    stream=True,
                    timeout=TIMEOUT,
                    allow_redirects=False,
                    verify=self._egress.ca_file,
                    proxies={self._origin.partition(":")[0]: proxy} if proxy else {},
                ) as response:
                    status = response.status_code
        except (OSError, urllib3.exceptions.HTTPError) as error:
            return causes.explain(
                error, self._origin, self._egress, TIMEOUT, "XAI_PROXY_NOTIFY_URL"
            )
        return "" if 200 <= status < 300 else f"{self._origin} answered HTTP {status}"
