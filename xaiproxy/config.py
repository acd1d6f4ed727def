"""The settings: one frozen object, made once, handed down; nothing else reads the environment or .env.

A setting comes from the first of:

1. the command line (`options`),
2. the environment,
3. `.env` in the working directory, XAI_PROXY_* names only,
4. its default.

An empty value counts as not set. An unknown XAI_PROXY_* name or a value that makes no sense is a
ConfigurationError. `python -m xaiproxy.config` prints conf/xaiproxy.env.example.
"""

import dataclasses
import difflib
import importlib.util
import io
import ipaddress
import os
import re
import ssl
import stat
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import certifi
import dotenv.parser

from xaiproxy import errors, folder_file

PREFIX = "XAI_PROXY_"
DEFAULT_ISSUER = "https://auth.x.ai"
DEFAULT_CLIENT_ID = "b1a00492-073a-47ea-816f-4c329264a828"
ALIASES = {"AUTH_PROXY_TOKEN_PATH": PREFIX + "TOKEN_PATH"}
# What Kubernetes puts into every pod of a namespace that has a Service called xai-proxy.
KUBERNETES_NAME = re.compile(
    r"XAI_PROXY_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)"
)
RESERVE = 16  # connections beyond the limit, of which none gets one to upstream
SPARE_DESCRIPTORS = 64  # for logs, the token file, the event loop and what the libraries open
QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
QUOTES_KEPT = "begins and ends with a quote, which docker's --env-file keeps as a part of the value; remove both quotes"
KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")
# Clients and other proxies use these; they are no setting of ours.
SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8
FOREIGN_NAMES = frozenset(PREFIX + name for name in ("KEY", "API_KEY", "BASE_URL", "OUTBOUND"))
DOTENV_LIMIT = 1 << 20  # bytes


def is_loopback(host: str | None) -> bool:
    """Whether `host` (a name or an IP literal without brackets) can only be this machine."""
    if host is None:
        return False
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def descriptors_for(connections: int) -> int:
    """File descriptors that so many client connections take: each has a connection to upstream."""
    return 2 * connections + RESERVE + SPARE_DESCRIPTORS


def connections_within(descriptors: int) -> int:
    """Client connections that fit in a file descriptor limit."""
    return max(1, (descriptors - RESERVE - SPARE_DESCRIPTORS) // 2)


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


def _whole(low: int, high: int) -> Callable[[str], int]:
    return _number(int, low, high, "a whole number")


def _seconds(low: float, high: float) -> Callable[[str], float]:
    return _number(float, low, high, "seconds")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return text

    return parse


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def _path(text: str) -> Path:
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


def _address(text: str) -> str:
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError("an IP address, such as 127.0.0.1, 0.0.0.0 or ::") from None


def is_authority(netloc: str) -> bool:
    """Whether it is a host and at most a port; what one parser takes for its host another may cut at another character."""
    return re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", netloc) is not None


def _url(text: str) -> urllib.parse.SplitResult:
    wanted = "an https URL (http on loopback only) without user, query or fragment"
    try:
        url = urllib.parse.urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError:
        raise ValueError(wanted) from None
    plain_on_loopback = url.scheme == "http" and is_loopback(host)
    if (
        not host
        or not (url.scheme == "https" or plain_on_loopback)
        or not re.fullmatch(r"[!-~]+", text)
    ):
        raise ValueError(wanted)
    if not is_authority(url.netloc) or "?" in text or "#" in text:
        raise ValueError(wanted)
    return url


def _issuer(text: str) -> str:
    return _url(text).geturl().rstrip("/")


def _origin(text: str) -> str:
    url = _url(text)
    if url.path not in ("", "/"):
        raise ValueError("an origin without a path: requests bring their own")
    return f"{url.scheme}://{url.netloc.lower()}"


def _token(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("printable ASCII without spaces")
    return text


def _scope(text: str) -> str:
    if not re.fullmatch(r"[!#-\[\]-~]+( [!#-\[\]-~]+)*", text):
        raise ValueError("scope names with one space between them (RFC 6749 section 3.3)")
    return text


def _hosts(text: str) -> frozenset[str]:
    names = frozenset(name.strip().lower().rstrip(".") for name in text.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", name):
            raise ValueError("host names without port, with commas between them")
    return names


def _origins(text: str) -> frozenset[str]:
    origins = frozenset(origin.strip().lower() for origin in text.split(",") if origin.strip())
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", origin):
            raise ValueError("origins such as https://chat.example.org, with commas between them")
    return origins


def _setting(default: str, parse: Callable[[str], Any], meaning: str) -> Any:
    return dataclasses.field(metadata={"default": default, "parse": parse, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Egress:
    """How we reach the world: one answer for both processes, since the libraries' own look-ups disagree.

    HTTP_PROXY has no say: plain http is spoken to loopback only, and loopback is never proxied. `proxy_from` and
    `ca_from` are the variables that the two come from, "" when there is none.
    """

    proxy: str | None = dataclasses.field(default=None, repr=False)
    no_proxy: str = ""
    ca_file: str = dataclasses.field(default_factory=certifi.where)
    proxy_from: str = ""
    ca_from: str = ""

    def proxy_for(self, url: str) -> str | None:
        """The proxy's URL for `url`, or None for a direct connection. It may hold a password: do not log it."""
        parts = urllib.parse.urlsplit(url)
        if self.proxy is None or parts.scheme == "http" or is_loopback(parts.hostname):
            return None
        if urllib.request.proxy_bypass_environment(parts.netloc, {"no": self.no_proxy}):
            return None
        return self.proxy


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, in the order of conf/xaiproxy.env.example. Times are seconds, sizes bytes."""

    token_path: Path = _setting(
        "~/.xai-proxy/tokens.json",
        _path,
        "The token file. Its folder is made with mode 0700 when it does not exist.",
    )
    bind: str = _setting(
        "127.0.0.1",
        _address,
        "The IP address that the proxy listens on. Another than loopback needs a client key: xai-client-key add NAME.",
    )
    port: int = _setting(
        "9090",
        _whole(0, 65535),
        "The TCP port that the proxy listens on; 0 takes any free one and says which.",
    )
    upstream: str = _setting(
        "https://api.x.ai",
        _origin,
        "Origin of the API; the request's own path and query are appended.",
    )
    issuer: str = _setting(
        DEFAULT_ISSUER,
        _issuer,
        "OpenID issuer, looked up at /.well-known/openid-configuration. A login belongs to its issuer.",
    )
    client_id: str = _setting(
        DEFAULT_CLIENT_ID,
        _token,
        "OAuth client. xAI registers no others; this is the Grok CLI's public one.",
    )
    scope: str = _setting(
        "openid profile email offline_access grok-cli:access api:access",
        _scope,
        "OAuth scope that a login asks for.",
    )
    redirect_port: int = _setting(
        "56121",
        _whole(0, 65535),
        "Loopback port of the browser login; another free one is taken when it is in use.",
    )
    refresh_skew: float = _setting(
        "120",
        _seconds(1, 86400),
        "Seconds: the token is renewed at least this long before it expires; a fifth of its lifetime if that is more.",
    )
    client_keys_file: Path = _setting(
        "",
        lambda text: _path(text) if text else None,
        "Who may call: a name and the SHA-256 of a key a line. Default: client-keys beside the token file.",
    )
    allow_anonymous: bool = _setting(
        "0",
        _flag,
        "1: serve without client keys on an address that is not loopback. Everyone who reaches it spends your quota.",
    )
    allowed_hosts: frozenset[str] = _setting(
        "",
        _hosts,
        "Host names, with commas between, under which callers without a key may address the proxy.",
    )
    allowed_origins: frozenset[str] = _setting(
        "",
        _origins,
        "Origins of web pages, with commas between, that may call the proxy without a key.",
    )
    connect_timeout: float = _setting(
        "10",
        _seconds(0.1, 600),
        "Seconds for a connection to upstream: name, all its addresses and TLS together.",
    )
    idle_timeout: float = _setting(
        "3600",
        _seconds(0.1, 86400),
        "Seconds without a byte from upstream, or of a client that takes none of those that wait for it, before it is given "
        "up. Reasoning models may be silent for long.",
    )
    sse_keepalive: float = _setting(
        "0",
        _seconds(0, 3600),
        "Seconds of silence in an event stream after which the proxy sends a comment; 0: never. For clients that cut "
        "off long reasoning. A comment cannot help before the head of the answer. Upstream is then asked not to "
        "compress.",
    )
    client_timeout: float = _setting(
        "30",
        _seconds(0.1, 3600),
        "Seconds that a client has to send its request head, and between two reads of its body; also those in which it "
        "reads nothing of an answer that the proxy gives itself.",
    )
    keepalive_timeout: float = _setting(
        "600",
        _seconds(0.1, 3600),
        "Seconds that an idle client connection stays open. Longer than clients keep theirs, or a request meets the "
        "close; answers announce a few seconds less (Keep-Alive: timeout=).",
    )
    max_connections: int = _setting(
        "10000",
        _whole(1, 1000000),
        "Client connections at once. For one more the longest idle is closed; when all have a request, the proxy "
        "answers health checks only and everything else with 503. Lowered to fit the file descriptor limit.",
    )
    replay_limit: int = _setting(
        "16777216",
        _whole(0, 1 << 40),
        "Bytes of one request body kept so that it can be sent again with a new token. A longer one streams through.",
    )
    replay_memory: int = _setting(
        "268435456", _whole(0, 1 << 40), "Bytes kept for that of all requests together."
    )
    drain_timeout: float = _setting(
        "25", _seconds(0, 3500), "Seconds that open streams get to finish after SIGTERM."
    )
    log_level: str = _setting(
        "info", _one_of("debug", "info", "warning", "error"), "debug, info, warning or error."
    )
    log_format: str = _setting(
        "auto",
        _one_of("auto", "text", "json"),
        "text, json, or auto: text on a terminal, JSON otherwise.",
    )

    egress: Egress = dataclasses.field(default_factory=Egress)
    warnings: tuple[str, ...] = ()  # for main to log once logging is set up


SETTINGS = {
    PREFIX + field.name.upper(): field for field in dataclasses.fields(Config) if field.metadata
}


def _refuse(error: errors.ConfigurationError) -> NoReturn:
    raise error


def from_environ(
    environ: Mapping[str, str],
    options: Mapping[str, str | None] | None = None,
    dotenv_path: str = ".env",
    complain: Callable[[errors.ConfigurationError], object] = _refuse,
) -> Config:
    """Return the Config, or raise ConfigurationError. `options`: setting name to text; None means not given.

    `complain` may take a ConfigurationError instead: what is wrong then counts as not set. Raised all the same is that
    of a default which makes no sense here: there is no home folder.
    """
    given: dict[str, str] = {}
    spelt = {}
    warnings = []
    for source in (
        _read_dotenv(dotenv_path, complain, warnings.append),
        _ours(environ),
        options or {},
    ):
        for spelling, text in source.items():
            name = ALIASES.get(spelling, spelling)
            if not text or KUBERNETES_NAME.fullmatch(name):
                continue
            if name == PREFIX + "PORT" and KUBERNETES_PORT.match(text):
                continue
            if name in FOREIGN_NAMES:
                warnings.append(f"{name} is not a setting of xaiproxy and is ignored")
            elif name not in SETTINGS:
                ours = [known.removeprefix(PREFIX) for known in SETTINGS]
                near = difflib.get_close_matches(name.removeprefix(PREFIX), ours, 1)
                complain(
                    errors.ConfigurationError(
                        f"{name if name.isprintable() else _shown(name)} is not a setting"
                        + (
                            f"; did you mean {PREFIX}{near[0]}?"
                            if near
                            else "; conf/xaiproxy.env.example lists them all"
                        ),
                        PREFIX + near[0] if near else name,
                    )
                )
            elif QUOTED.fullmatch(text):
                complain(errors.ConfigurationError(f"{spelling} {QUOTES_KEPT}", name))
            else:
                given[name], spelt[name] = text, spelling
    values = {
        field.name: _value(spelt.get(name, name), given.get(name), field.metadata, complain)
        for name, field in SETTINGS.items()
    }
    if values["client_keys_file"] is None:
        values["client_keys_file"] = values["token_path"].parent / "client-keys"
    return Config(
        egress=_egress(environ, complain), warnings=tuple(dict.fromkeys(warnings)), **values
    )


def _value(name: str, text: str | None, about: Mapping[str, Any], complain: Callable) -> Any:
    chosen = about["default"] if text is None else text
    try:
        return about["parse"](chosen)
    except ValueError as error:
        wrong = errors.ConfigurationError(f"{name} is {_shown(chosen)}, but takes {error}", name)
    if text is None:
        raise wrong
    complain(wrong)
    return _value(name, None, about, complain)


def _shown(text: str) -> str:
    return repr(re.sub(r"(?s).*@", "***@", text))  # somebody may have put a password into a URL


def _ours(environ: Mapping[str, str]) -> dict[str, str]:
    aliases = {name: environ[name] for name in ALIASES if name in environ}
    return aliases | {name: text for name, text in environ.items() if name.startswith(PREFIX)}


def _read_dotenv(path: str, complain: Callable, warn: Callable[[str], object]) -> dict[str, str]:
    # Only our own names: a .env often belongs to somebody else's program. No ${} interpolation: values are values.
    if not os.path.isfile(path):
        return {}
    try:
        content, status = folder_file.read(Path(path), DOTENV_LIMIT + 1, follow=True)
        if len(content) > DOTENV_LIMIT:
            raise ValueError(f"it is longer than {DOTENV_LIMIT} bytes")
    except (OSError, ValueError) as error:
        complain(errors.ConfigurationError(f"{os.path.abspath(path)} cannot be read: {error}"))
        return {}
    ours = {}
    text = content.decode(
        "utf-8-sig", "surrogateescape"
    )  # lines that are not ours may be in any encoding
    for statement in dotenv.parser.parse_stream(io.StringIO(text, newline=None)):
        name, value = statement.key or "", statement.value or ""
        if statement.error and PREFIX in statement.original.string:
            complain(_unparsed(path, statement.original))
        elif name.startswith(PREFIX) and SURROGATE.search(value):
            complain(
                errors.ConfigurationError(
                    f"{os.path.abspath(path)} cannot be read: {name} is not UTF-8", name
                )
            )
        elif name.startswith(PREFIX):
            ours[name] = value
    if ours and (wrong := _wrong_with_file(status)):
        complain(errors.ConfigurationError(f"{os.path.abspath(path)} {wrong}"))
        return {}
    if ours and status.st_mode & stat.S_IWGRP:
        warn(
            f"{os.path.abspath(path)} may be written by its group, who could have others call, or sign you in elsewhere; "
            "chmod g-w it"
        )
    return ours


def _unparsed(path: str, statement: dotenv.parser.Original) -> errors.ConfigurationError:
    # An unclosed quote may take the lines up to the next quote with it, and so several settings.
    start = statement.string.index(PREFIX)
    line = statement.line + statement.string.count("\n", 0, start)
    name = re.match(r"\w+", statement.string[start:])[0]
    return errors.ConfigurationError(
        f"{os.path.abspath(path)} line {line} does not parse: write {name}=VALUE, and close "
        "every quote",
        name if statement.string.count(PREFIX) == 1 else None,
    )


def _wrong_with_file(status: os.stat_result) -> str:
    """Why nothing is to be believed that stands in a file: a stranger who sets ISSUER is who the next login goes to."""
    if status.st_uid not in (0, os.geteuid()):
        return (
            f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}: its settings may be a "
            "stranger's; start in another folder, chown it, or set them in the environment"
        )
    if status.st_mode & stat.S_IWOTH:
        return "may be written by every user, so its settings may be a stranger's; look through it and chmod o-w it"
    return ""


def _egress(environ: Mapping[str, str], complain: Callable) -> Egress:
    def first(*names: str) -> tuple[str, str]:
        for name in names:
            for spelling in (name.lower(), name):  # lower case wins, as in curl
                if text := environ.get(spelling):
                    return (
                        wrong(spelling, QUOTES_KEPT) if QUOTED.fullmatch(text) else (spelling, text)
                    )
        return "", ""

    def wrong(name: str, takes: str) -> tuple[str, str]:
        complain(errors.ConfigurationError(f"{name} {takes}", name.upper()))
        return "", ""

    name, proxy = first("HTTPS_PROXY", "ALL_PROXY")
    if proxy:
        proxy = proxy if "://" in proxy else "http://" + proxy
        if takes := _wrong_with_proxy(proxy):
            name, proxy = wrong(name, takes)
    ca_name, ca_file = first("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    if ca_file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
        except OSError:  # SSLError is one
            ca_name, ca_file = wrong(
                ca_name, f"is {_shown(ca_file)}, but takes a file of PEM certificates"
            )
    return Egress(
        proxy=proxy or None,
        no_proxy=first("NO_PROXY")[1],
        ca_file=ca_file or certifi.where(),
        proxy_from=name,
        ca_from=ca_name,
    )


def _wrong_with_proxy(proxy: str) -> str:
    # The value may hold a password: it is not repeated in the error.
    try:
        url = urllib.parse.urlsplit(proxy)
        usable = bool(url.hostname) and (url.port or True)
    except ValueError:
        usable = False
    if usable and url.scheme == "socks":  # as GNOME and KDE set it
        return "names a SOCKS proxy, but not its version: begin with socks5h:// for version 5, or socks4a:// for 4"
    if not usable or url.scheme not in ("http", "https", "socks5", "socks5h", "socks4", "socks4a"):
        return "takes the URL of a proxy, such as http://proxy.example:3128"
    if url.scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        return "names a SOCKS proxy: install xaiproxy[socks] for that"
    return ""


def example() -> str:
    """The text of conf/xaiproxy.env.example."""
    lines = [
        "# Every setting of xaiproxy with its default. Copy what you change to .env in the working directory,",
        "# or set it in the environment, which wins over .env. Seconds may have decimals; sizes are bytes.",
        "# An empty value counts as not set; an unknown XAI_PROXY_ name is an error.",
    ]
    for name, field in SETTINGS.items():
        lines += ["", "# " + field.metadata["meaning"], f"#{name}={field.metadata['default']}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(example(), end="")
