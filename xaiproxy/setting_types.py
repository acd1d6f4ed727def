"""The types of settings: each function turns a text into a value.

It raises ValueError with what the text must be, such as "a whole number from 0 to 65535".
"""

import contextlib
import ipaddress
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from xaiproxy import addresses
from xaiproxy.addresses import UnixSocket

Number = TypeVar("Number", int, float)

# Bytes of the path of a Unix socket that fit in macOS's sockaddr_un; Linux has room for 107.
PATH_LIMIT = 103
# The names of Kubernetes (RFC 1123): a namespace's and a Secret's.
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
)
QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
QUOTES_KEPT = (
    "begins and ends with a quote, which docker's --env-file keeps as part of the value; "
    "remove both quotes"
)


def _number(
    parse: Callable[[str], Number], low: Number, high: Number, noun: str
) -> Callable[[str], Number]:
    def number(text: str) -> Number:
        try:
            if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) and low <= (value := parse(text)) <= high:
                return value
        except ValueError:
            pass
        raise ValueError(f"{noun} from {low} to {high}")

    return number


def whole(low: int, high: int) -> Callable[[str], int]:
    return _number(int, low, high, "a whole number")


def seconds(low: float, high: float) -> Callable[[str], float]:
    return _number(float, low, high, "a number of seconds")


def one_of(*choices: str) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{', '.join(choices[:-1])} or {choices[-1]}")
        return text

    return choice


def flag(text: str) -> bool:
    return one_of("0", "1")(text) == "1"


def path(text: str) -> Path:
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("a path without ~, as no home directory is known") from None
    except FileNotFoundError:
        raise ValueError("an absolute path, as the working directory was deleted") from None
    # / has no siblings, such as the lock file.
    if "\0" in text or not path.name:
        raise ValueError("the path of a file")
    if text.endswith("/") or os.path.isdir(path):
        raise ValueError("the path of a file in that folder")
    return path


def ip_address(text: str) -> str:
    return "127.0.0.1" if text == "localhost" else str(ipaddress.ip_address(text.strip("[]")))


def address(text: str) -> str | UnixSocket:
    if text.startswith("unix:"):
        return unix_socket(text.removeprefix("unix:"))
    try:
        return ip_address(text)
    except ValueError:
        raise ValueError("an IP address, such as 127.0.0.1, 0.0.0.0 or ::, or unix:/path") from None


def unix_socket(text: str) -> UnixSocket:
    match = re.fullmatch(r"([^,]+)(?:,group=([^,]+))?", text)
    if match is None:
        raise ValueError("unix:/path or unix:/path,group=NAME")
    found = path(match[1])
    if len(os.fsencode(found)) > PATH_LIMIT:
        raise ValueError(f"unix: and a path of at most {PATH_LIMIT} bytes")
    return UnixSocket(found, match[2])


def host_and_port(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    host, _, port = text.rpartition(":")
    try:
        # An IPv6 address without brackets could have its last group taken for the port.
        if ":" in host and not re.fullmatch(r"\[.*\]", host):
            raise ValueError
        return ip_address(host), whole(0, 65535)(port)
    except ValueError:
        raise ValueError("an IP address and a port, such as 127.0.0.1:9091 or [::]:9091") from None


def _http(text: str, *, with_user: bool = False) -> urllib.parse.SplitResult:
    """Raises ValueError unless `text` is an http or https URL with a valid authority."""
    parts = urllib.parse.urlsplit(text)
    host_and_port = parts.netloc.rpartition("@")[2] if with_user else parts.netloc
    if (
        parts.scheme in ("http", "https")
        and parts.hostname
        and parts.port != 0
        and re.fullmatch(r"[!-~]+", text)
        and addresses.is_authority(host_and_port)
    ):
        return parts
    raise ValueError


def url(text: str) -> urllib.parse.SplitResult:
    with contextlib.suppress(ValueError):
        parts = _http(text)
        is_safe = parts.scheme == "https" or addresses.is_loopback(parts.hostname)
        if is_safe and not re.search("[?#]", text):
            return parts
    raise ValueError("an https URL (http on loopback only) without user, query or fragment")


def issuer(text: str) -> str:
    return url(text).geturl().rstrip("/")


def origin(text: str) -> str:
    parts = url(text)
    if parts.path not in ("", "/"):
        raise ValueError("an origin without a path, which each request has of its own")
    return f"{parts.scheme}://{parts.netloc.lower()}"


def notify_url(text: str) -> str:
    if not text:
        return ""
    with contextlib.suppress(ValueError):
        parts = _http(text, with_user=True)
        if not parts.fragment:
            return parts.geturl()
    raise ValueError("an http or https URL without a fragment")


def refresher(text: str) -> str:
    if not text:
        return ""
    with contextlib.suppress(ValueError):
        parts = _http(text)
        if text in (origin := f"{parts.scheme}://{parts.netloc}", f"{origin}/"):
            return origin
    raise ValueError("an http or https URL without a path, such as http://xaiproxy-refresher:9092")


class SecretName(NamedTuple):
    """A Secret of Kubernetes."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def publish(text: str) -> Path | SecretName | None:
    if not text:
        return None
    kind, _, target = text.partition(":")
    if kind == "file" and target.startswith(("/", "~")):
        return path(target)
    namespace, _, name = target.partition("/")
    if kind == "kubernetes-secret" and LABEL.fullmatch(namespace) and SUBDOMAIN.fullmatch(name):
        return SecretName(namespace, name)
    raise ValueError("kubernetes-secret:NAMESPACE/NAME or file:/path")


def client_id(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("printable ASCII without spaces")
    return text


def scope(text: str) -> str:
    if not re.fullmatch(r"[!#-\[\]-~]+( [!#-\[\]-~]+)*", text):
        raise ValueError("scope names separated by single spaces (RFC 6749 section 3.3)")
    return text


def hosts(text: str) -> frozenset[str]:
    names = frozenset(name.strip().lower().rstrip(".") for name in text.split(",") if name.strip())
    if not all(re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", name) for name in names):
        raise ValueError("host names without a port, separated by commas")
    return names


def origins(text: str) -> frozenset[str]:
    found = frozenset(origin.strip().lower() for origin in text.split(",") if origin.strip())
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", one) for one in found):
        raise ValueError("origins such as https://chat.example.org, separated by commas")
    return found


def shown(text: str) -> str:
    """The text in quotes for an error, without the password that a URL may hold."""
    return repr(re.sub(r"(?s).*@", "***@", text))
