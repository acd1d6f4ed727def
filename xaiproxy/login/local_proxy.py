"""The proxy at the configured address: whether one listens there, and whether it is ready."""

import dataclasses
import enum
import ipaddress

from xaiproxy import config, errors
from xaiproxy.login.wording import printable
from xaiproxy.oauth.causes import causes_of
from xaiproxy.oauth.session import Session

DEADLINE = 3.0  # seconds for each of the two requests


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


def find(settings: config.Config) -> LocalProxy:
    """Ask /healthz and /readyz, which require no client key. `settings.port` must not be 0."""
    session = Session(settings, address_from="XAI_PROXY_BIND")
    url = url_of(settings)
    try:
        if session.get(url + "/healthz", DEADLINE).json() != {"status": "ok"}:
            return LocalProxy(url, Listener.OTHER)
        answer = session.get(url + "/readyz", DEADLINE)
    except errors.IssuerUnavailable as error:
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes_of(error)):
            return LocalProxy(url, Listener.NOTHING)
        return LocalProxy(url, Listener.SILENT, reason=str(error))
    members = answer.json() or {}
    reason, warning = (printable(str(members.get(name, ""))) for name in ("reason", "warning"))
    return LocalProxy(url, Listener.PROXY, answer.status == 200, reason, warning)


def url_of(settings: config.Config) -> str:
    """Return the proxy's origin, on loopback if it listens on every address."""
    address = ipaddress.ip_address(settings.bind)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://{f'[{address}]' if address.version == 6 else address}:{settings.port}"
