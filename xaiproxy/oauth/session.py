"""HTTP to the issuer: one request on one new connection, over before one deadline, with no trace of a secret.

requests bounds neither the name look-up nor a server that sends a byte a second, so each call is made in a thread of its
own, and given up at the deadline. A connection is never used twice: on one that lay idle for hours behind a NAT, a
refresh token would vanish.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import http.client
import io
import json
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import requests
import urllib3

from xaiproxy import __version__, config, errors, trust
from xaiproxy.egress import Egress
from xaiproxy.oauth.transport import Adapter

BODY_LIMIT = 1 << 20  # bytes
# Seconds, at most, after a deadline that a process slept through (SIGSTOP, docker pause): what came meanwhile is still
# to be read, and may be the only copy of a login.
LAST_LOOK = 1.0
HEADERS = {"User-Agent": f"xaiproxy/{__version__}", "Accept": "application/json"}
MEDIA_TYPE = re.compile(r"[\w.+-]{1,40}/[\w.+-]{1,40}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """retry_after: seconds that the issuer asks us to wait (RFC 9110 section 10.2.3), or None."""

    status: int
    headers: Mapping[str, str]
    body: bytes = dataclasses.field(repr=False)
    retry_after: float | None = None

    def json(self) -> dict[str, Any] | None:
        """The body, if it is a JSON object."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def media_type(self) -> str:
        match = MEDIA_TYPE.match(self.headers.get("Content-Type", ""))
        return match[0].lower() if match else ""

    @property
    def is_html(self) -> bool:
        """Whether it is a page, whatever else its label says. A JSON object that is labelled as a page is none."""
        return self.json() is None and (
            self.media_type == "text/html"
            or self.body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
        )

    @property
    def summary(self) -> str:
        """For a message, such as "HTTP 502, text/html". Never quotes the body."""
        return f"HTTP {self.status}, {self.media_type or 'no media type'}"


class Session:
    """Sends requests. Each raises IssuerUnavailable; `deadline` is in seconds and bounds all of it.

    `address_from`: the setting that an error names when an address does not answer.
    """

    def __init__(
        self,
        settings: config.Config,
        now: Callable[[], float] = time.time,
        address_from: str = "XAI_PROXY_ISSUER",
    ):
        self.egress = settings.egress
        self.address_from = address_from
        self._now = now

    def get(self, url: str, deadline: float = 30.0, headers: Mapping[str, str] = {}) -> Answer:
        return self._call("GET", url, dict(headers), None, deadline)

    def post(self, url: str, form: Mapping[str, str], deadline: float = 30.0) -> Answer:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._call(
            "POST", url, headers, _Body(urllib.parse.urlencode(form).encode()), deadline
        )

    def _call(
        self, method: str, url: str, headers: dict[str, str], body: _Body | None, deadline: float
    ) -> Answer:
        end = time.monotonic() + deadline
        outcome: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        given_up = threading.Event()

        def work() -> None:
            try:
                outcome.put(self._send(method, url, headers, body, end, given_up))
            except BaseException as error:  # handed to the caller, who raises it
                outcome.put(error)

        threading.Thread(target=work, name=f"{method} {url}", daemon=True).start()
        try:
            try:
                result = outcome.get(timeout=deadline)
            except queue.Empty:
                if body:
                    body.abandon()
                late = max(0.0, time.monotonic() - end)
                result = outcome.get(timeout=min(late, LAST_LOOK))
        except queue.Empty:
            result = TimeoutError()
        finally:
            given_up.set()
            # Whoever was told that nothing was sent may send the same refresh token again: from here on, the
            # thread must not.
            sent = body.abandon() if body else False
        if isinstance(result, Answer):
            return result
        if isinstance(
            result, (OSError, urllib3.exceptions.HTTPError)
        ):  # all of requests' are OSErrors
            message = _explain(result, url, self.egress, deadline, self.address_from)
            raise errors.IssuerUnavailable(message, sent=sent) from result
        raise result

    def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: _Body | None,
        end: float,
        given_up: threading.Event,
    ) -> Answer:
        proxy = self.egress.proxy_for(url)
        timeout = max(
            end - time.monotonic(), 0.001
        )  # seconds for each step, so that the thread ends, too
        context = self._context() if url.startswith("https:") else None
        with requests.Session() as web:
            web.trust_env = False
            for scheme in ("https://", "http://"):
                web.mount(scheme, Adapter(context))
            web.headers = requests.structures.CaseInsensitiveDict(HEADERS | headers)
            with web.request(
                method,
                url,
                data=body,
                stream=True,
                timeout=timeout,
                allow_redirects=False,
                verify=self.egress.ca_file,
                proxies={"https": proxy} if proxy else {},
            ) as response:
                content = b""
                while chunk := response.raw.read1(65536, decode_content=True):
                    content += chunk
                    if len(content) > BODY_LIMIT:
                        raise urllib3.exceptions.ResponseError("too long")
                    if given_up.is_set():
                        raise TimeoutError
                retry_after = parse_retry_after(
                    response.headers.get("Retry-After", ""), self._now()
                )
                return Answer(response.status_code, response.headers, content, retry_after)

    def _context(self) -> ssl.SSLContext:
        """A new one each time: the file may have been replaced."""
        try:
            return trust.context(self.egress)
        except OSError as error:
            raise errors.IssuerUnavailable(
                f"the CA certificates of {self.egress.ca_file} cannot be read "
                f"({error.strerror}); put that file right, or set SSL_CERT_FILE"
            ) from error


class _Body(io.BytesIO):
    """A request body that knows whether any of it went out. It is read only once there is a connection."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._mutex = threading.Lock()
        self._sent = False
        self._abandoned = False

    def read(self, size: int | None = -1) -> bytes:
        with self._mutex:
            if self._abandoned:
                raise TimeoutError
            self._sent = True
        return super().read(size)

    def abandon(self) -> bool:
        """Let nothing out that is not out yet; return whether something was."""
        with self._mutex:
            self._abandoned = True
            return self._sent


def parse_retry_after(text: str, now: float) -> float | None:
    """Seconds from `now`, of either form of RFC 9110 section 10.2.3; None when it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    date = parse_date(text)
    return None if date is None else max(0.0, date - now)


def parse_date(text: str) -> float | None:
    """Unix seconds of an HTTP date (RFC 9110 section 5.6.7); None when it is none."""
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if date.tzinfo is None:  # the asctime form names no zone
        date = date.replace(tzinfo=datetime.timezone.utc)
    return date.timestamp()


def _explain(error: Exception, url: str, egress: Egress, deadline: float, address_from: str) -> str:
    """One sentence. The exceptions' own texts are not used: they may hold the proxy's password."""
    host = urllib.parse.urlsplit(url).netloc
    causes = list(causes_of(error))
    through = urllib.parse.urlsplit(egress.proxy_for(url) or "")
    through = f"{through.hostname}:{through.port}" if through.port else through.hostname

    def find(*kinds: type) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if certificate := find(ssl.SSLCertVerificationError):
        return f"the certificate of {host} cannot be verified {trust.refusal(certificate, egress)}"
    if find(requests.exceptions.ProxyError):
        status = re.search(r"Tunnel connection failed: ([0-9]{3})", " ".join(map(str, causes)))
        said = f" (HTTP {status[1]})" if status else ""
        return f"the proxy {through} gave no connection to {host}{said}; check HTTPS_PROXY and NO_PROXY"
    if through:
        host += f" (through the proxy {through})"
    if find(socket.gaierror):
        return (
            f"the name {host} cannot be resolved; check the network, or set HTTPS_PROXY if need be"
        )
    if find(urllib3.exceptions.ResponseError):
        return f"{host} answered with more than {BODY_LIMIT} bytes, which cannot be right"
    if find(ConnectionResetError, BrokenPipeError, http.client.HTTPException):
        return f"{host} broke the connection off before its answer was whole; try again"
    if tls := find(ssl.SSLError):
        return f"{host} gave no TLS connection ({tls.reason}); check the network"
    if system := next(
        (cause for cause in causes if isinstance(cause, OSError) and cause.strerror), None
    ):
        return f"{host} cannot be reached ({system.strerror}); check the network, or {address_from}"
    if find(TimeoutError, urllib3.exceptions.TimeoutError):
        return f"{host} gave no whole answer within {deadline:g} s; check the network and try again"
    return f"{host} gave no answer that can be read ({type(error).__name__}); try again"


def causes_of(error: BaseException | None) -> Any:
    """The exception and those inside it: urllib3 and requests keep them in args, reason, cause or context."""
    pending, seen = [error], set()
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            yield error
            pending += [
                getattr(error, "reason", None),
                *error.args,
                error.__cause__,
                error.__context__,
            ]
