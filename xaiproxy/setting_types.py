"""What settings take: each function turns a text into a value, or raises ValueError with what it takes instead."""

import ipaddress
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xaiproxy import addresses

QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
QUOTES_KEPT = "begins and ends with a quote, which docker's --env-file keeps as a part of the value; remove both quotes"


def _number(kind: type, low: float, high: float, noun: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
                raise ValueError
            value = kind(text)
        except ValueError:
            raise ValueError(f"{noun} from {low:g} to {high:g}") from None
        if not low <= value <= high:
            raise ValueError(f"{noun} from {low:g} to {high:g}")
        return value

    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    return _number(int, low, high, "a whole number")


def seconds(low: float, high: float) -> Callable[[str], float]:
    return _number(float, low, high, "seconds")


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return text

    return parse


def flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def path(text: str) -> Path:
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("the path of a file; there is no home folder for ~ here") from None
    except FileNotFoundError:
        raise ValueError(
            "the absolute path of a file, since the working directory was deleted"
        ) from None
    if "\0" in text or not path.name:  # of / no sibling can be named
        raise ValueError("the path of a file")
    if text.endswith("/") or os.path.isdir(path):  # such as a volume's
        raise ValueError("the path of a file in that folder, not the folder's own")
    return path


def address(text: str) -> str:
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError("an IP address, such as 127.0.0.1, 0.0.0.0 or ::") from None


def url(text: str) -> urllib.parse.SplitResult:
    wanted = "an https URL (http on loopback only) without user, query or fragment"
    try:
        url = urllib.parse.urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError:
        raise ValueError(wanted) from None
    plain_on_loopback = url.scheme == "http" and addresses.is_loopback(host)
    if (
        not host
        or not (url.scheme == "https" or plain_on_loopback)
        or not re.fullmatch(r"[!-~]+", text)
    ):
        raise ValueError(wanted)
    if not addresses.is_authority(url.netloc) or "?" in text or "#" in text:
        raise ValueError(wanted)
    return url


def issuer(text: str) -> str:
    return url(text).geturl().rstrip("/")


def origin(text: str) -> str:
    parts = url(text)
    if parts.path not in ("", "/"):
        raise ValueError("an origin without a path: requests bring their own")
    return f"{parts.scheme}://{parts.netloc.lower()}"


def token(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("printable ASCII without spaces")
    return text


def scope(text: str) -> str:
    if not re.fullmatch(r"[!#-\[\]-~]+( [!#-\[\]-~]+)*", text):
        raise ValueError("scope names with one space between them (RFC 6749 section 3.3)")
    return text


def hosts(text: str) -> frozenset[str]:
    names = frozenset(name.strip().lower().rstrip(".") for name in text.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", name):
            raise ValueError("host names without port, with commas between them")
    return names


def origins(text: str) -> frozenset[str]:
    origins = frozenset(origin.strip().lower() for origin in text.split(",") if origin.strip())
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", origin):
            raise ValueError("origins such as https://chat.example.org, with commas between them")
    return origins


def shown(text: str) -> str:
    return repr(re.sub(r"(?s).*@", "***@", text))  # somebody may have put a password into a URL
