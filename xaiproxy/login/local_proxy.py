"""The proxy at the configured address: whether one listens there, and whether it is ready."""

import contextlib
import dataclasses
import enum
import functools
import http.client
import ipaddress
import socket
from collections.abc import Callable

from xaiproxy import config, errors
from xaiproxy.addresses import UnixSocket
from xaiproxy.judgement import Judgement
from xaiproxy.login.wording import printable
from xaiproxy.oauth.causes import BODY_LIMIT, causes_of
from xaiproxy.oauth.session import Answer, Session

DEADLINE = 3.0  # seconds for each of the two requests
# The second one: for a Unix socket.
NOTHING_LISTENS = (ConnectionRefusedError, FileNotFoundError)

OTHER_SETTINGS = "seems to run with other settings than these"


class Listener(enum.Enum):
    PROXY = "proxy"
    NOTHING = "nothing"
    # A program that is no proxy of ours.
    OTHER = "other"
    # No complete answer came.
    SILENT = "silent"


@dataclasses.dataclass(frozen=True)
class LocalProxy:
    """`reason`: the proxy's own reason for being ready or not, or why it is SILENT.

    `warning`: what is wrong although it is ready, or "".
    """

    url: str
    kind: Listener
    ready: bool = False
    reason: str = ""
    warning: str = ""

    @property
    def api(self) -> str:
        """The base URL of its API, or its Unix socket."""
        return self.url if self._is_unix else f"{self.url}/v1"

    @property
    def setting(self) -> str:
        """The setting that names another address."""
        return "XAI_PROXY_BIND" if self._is_unix else "XAI_PROXY_PORT"

    def has_other_settings(self, verdict: Judgement) -> bool:
        """Whether its login seems to be another one than that of `verdict`, of the files here."""
        return self.ready and self.reason != verdict.reason

    @property
    def _is_unix(self) -> bool:
        return self.url.startswith("unix:")


def find(settings: config.Config) -> LocalProxy:
    """Ask /healthz and /readyz, which require no client key.

    `settings.has_known_address` must be true.
    """
    bind = settings.bind
    if isinstance(bind, UnixSocket):
        url = str(bind)
        get: Callable[[str], Answer] = functools.partial(_get_over, bind)
    else:
        url = url_of(bind, settings.port)
        get = functools.partial(_get, Session(settings, address_from="XAI_PROXY_BIND"), url)
    try:
        if get("/healthz").json() != {"status": "ok"}:
            return LocalProxy(url, Listener.OTHER)
        answer = get("/readyz")
    except errors.IssuerUnavailable as error:
        if any(isinstance(cause, NOTHING_LISTENS) for cause in causes_of(error)):
            return LocalProxy(url, Listener.NOTHING)
        return LocalProxy(url, Listener.SILENT, reason=str(error))
    members = answer.json() or {}
    reason, warning = (printable(str(members.get(name, ""))) for name in ("reason", "warning"))
    return LocalProxy(url, Listener.PROXY, answer.status == 200, reason, warning)


def url_of(bind: str, port: int) -> str:
    """Return the proxy's origin, on loopback if it listens on every address."""
    address = ipaddress.ip_address(bind)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://{f'[{address}]' if address.version == 6 else address}:{port}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: UnixSocket):
        super().__init__("localhost", timeout=DEADLINE)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._address.path))


def _get(session: Session, url: str, path: str) -> Answer:
    return session.get(url + path, DEADLINE)


def _get_over(address: UnixSocket, path: str) -> Answer:
    """Raises IssuerUnavailable."""
    try:
        with contextlib.closing(_UnixConnection(address)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return Answer(response.status, {}, response.read(BODY_LIMIT))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise errors.IssuerUnavailable(f"{address}: {reason}") from error
