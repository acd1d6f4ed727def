"""HTTP to the issuer: a new connection and a deadline for each request, no secret in an error.

The timeouts of requests cover neither the name lookup nor a server that sends a byte a second. So
each call runs in a thread of its own, which is abandoned at the deadline. Connections are not
reused: a NAT may have dropped one that was idle for hours, and a refresh token sent on it would be
lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import io
import json
import queue
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import requests
import urllib3

from xaiproxy import __version__, config, errors, trust
from xaiproxy.oauth import causes
from xaiproxy.oauth.transport import Adapter

# Seconds, at most, to read a response that arrived while the process was stopped past its deadline
# (SIGSTOP, docker pause): it may be the only copy of a login.
GRACE_PERIOD = 1.0
HEADERS = {"User-Agent": f"xaiproxy/{__version__}", "Accept": "application/json"}
MEDIA_TYPE = re.compile(r"[\w.+-]{1,40}/[\w.+-]{1,40}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """`retry_after`: seconds to wait, from Retry-After (RFC 9110 section 10.2.3), or None."""

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
        """Whether it is an HTML page, by its label or content. A JSON object never is."""
        return self.json() is None and (
            self.media_type == "text/html"
            or self.body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
        )

    @property
    def summary(self) -> str:
        """For a message, such as "HTTP 502, text/html". Never contains any of the body."""
        return f"HTTP {self.status}, {self.media_type or 'no media type'}"


class Session:
    """Sends requests. Each raises IssuerUnavailable. `deadline`: seconds for the whole call.

    `address_from`: name of the setting that an error recommends to check if an address is
    unreachable.
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

    def patch(
        self, url: str, content: bytes, headers: Mapping[str, str], deadline: float = 30.0
    ) -> Answer:
        return self._call("PATCH", url, dict(headers), _Body(content), deadline)

    def _call(
        self, method: str, url: str, headers: dict[str, str], body: _Body | None, deadline: float
    ) -> Answer:
        end = time.monotonic() + deadline
        outcome: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def work() -> None:
            try:
                outcome.put(self._send(method, url, headers, body, end, abandoned))
            # The calling thread raises it.
            except BaseException as error:
                outcome.put(error)

        threading.Thread(target=work, name=f"{method} {url}", daemon=True).start()
        try:
            try:
                result = outcome.get(timeout=deadline)
            except queue.Empty:
                if body:
                    body.abandon()
                late = max(0.0, time.monotonic() - end)
                result = outcome.get(timeout=min(late, GRACE_PERIOD))
        except queue.Empty:
            result = TimeoutError()
        finally:
            abandoned.set()
            # If nothing was sent, the caller may send the same refresh token again. So the thread
            # must not send it from here on.
            sent = body.abandon() if body else False
        if isinstance(result, Answer):
            return result
        # All exceptions of requests are OSErrors.
        if isinstance(result, (OSError, urllib3.exceptions.HTTPError)):
            message = causes.explain(result, url, self.egress, deadline, self.address_from)
            raise errors.IssuerUnavailable(message, sent=sent) from result
        raise result

    def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: _Body | None,
        end: float,
        abandoned: threading.Event,
    ) -> Answer:
        proxy = self.egress.proxy_for(url)
        # Seconds for each step, so that an abandoned thread ends as well.
        timeout = max(end - time.monotonic(), 0.001)
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
                    if len(content) > causes.BODY_LIMIT:
                        raise urllib3.exceptions.ResponseError("too long")
                    if abandoned.is_set():
                        raise TimeoutError
                retry_after = parse_retry_after(
                    response.headers.get("Retry-After", ""), self._now()
                )
                return Answer(response.status_code, response.headers, content, retry_after)

    def _context(self) -> ssl.SSLContext:
        """A new context for each call: the CA file may have been replaced."""
        try:
            return trust.context(self.egress)
        except OSError as error:
            raise errors.IssuerUnavailable(
                f"the CA certificates of {self.egress.ca_file} cannot be read "
                f"({error.strerror}); correct that file, or set SSL_CERT_FILE"
            ) from error


class _Body(io.BytesIO):
    """A request body that records whether any of it was sent. It is read only after connecting."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._mutex = threading.Lock()
        self._sent = False
        self._abandoned = False

    def read(self, size: int | None = -1) -> bytes:
        with self._mutex:
            if self._abandoned and not self._sent:
                raise TimeoutError
            self._sent = True
        return super().read(size)

    def abandon(self) -> bool:
        """Prevent the first read; return whether there was one.

        Later ones are not prevented: the issuer may have all of the request, and respond with the
        only copy of a refresh token.
        """
        with self._mutex:
            self._abandoned = True
            return self._sent


def parse_retry_after(text: str, now: float) -> float | None:
    """Seconds from `now`, from either form of RFC 9110 section 10.2.3; None for any other text."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    date = parse_date(text)
    return None if date is None else max(0.0, date - now)


def parse_date(text: str) -> float | None:
    """Unix seconds of an HTTP date (RFC 9110 section 5.6.7); None for any other text."""
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    # The asctime form has no zone.
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)
    return date.timestamp()
