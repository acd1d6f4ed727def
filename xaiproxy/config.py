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
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from xaiproxy import dotenv_file, errors, setting_types
from xaiproxy.egress import Egress

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
KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")
# Clients and other proxies use these; they are no setting of ours.
FOREIGN_NAMES = frozenset(PREFIX + name for name in ("KEY", "API_KEY", "BASE_URL", "OUTBOUND"))


def descriptors_for(connections: int) -> int:
    """File descriptors that so many client connections take: each has a connection to upstream."""
    return 2 * connections + RESERVE + SPARE_DESCRIPTORS


def connections_within(descriptors: int) -> int:
    """Client connections that fit in a file descriptor limit."""
    return max(1, (descriptors - RESERVE - SPARE_DESCRIPTORS) // 2)


def _setting(default: str, parse: Callable[[str], Any], meaning: str) -> Any:
    return dataclasses.field(metadata={"default": default, "parse": parse, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, in the order of conf/xaiproxy.env.example. Times are seconds, sizes bytes."""

    token_path: Path = _setting(
        "~/.xai-proxy/tokens.json",
        setting_types.path,
        "The token file. Its folder is made with mode 0700 when it does not exist.",
    )
    bind: str = _setting(
        "127.0.0.1",
        setting_types.address,
        "The IP address that the proxy listens on. Another than loopback needs a client key: xai-client-key add NAME.",
    )
    port: int = _setting(
        "9090",
        setting_types.whole(0, 65535),
        "The TCP port that the proxy listens on; 0 takes any free one and says which.",
    )
    upstream: str = _setting(
        "https://api.x.ai",
        setting_types.origin,
        "Origin of the API; the request's own path and query are appended.",
    )
    issuer: str = _setting(
        DEFAULT_ISSUER,
        setting_types.issuer,
        "OpenID issuer, looked up at /.well-known/openid-configuration. A login belongs to its issuer.",
    )
    client_id: str = _setting(
        DEFAULT_CLIENT_ID,
        setting_types.token,
        "OAuth client. xAI registers no others; this is the Grok CLI's public one.",
    )
    scope: str = _setting(
        "openid profile email offline_access grok-cli:access api:access",
        setting_types.scope,
        "OAuth scope that a login asks for.",
    )
    redirect_port: int = _setting(
        "56121",
        setting_types.whole(0, 65535),
        "Loopback port of the browser login; another free one is taken when it is in use.",
    )
    refresh_skew: float = _setting(
        "120",
        setting_types.seconds(1, 86400),
        "Seconds: the token is renewed at least this long before it expires; a fifth of its lifetime if that is more.",
    )
    client_keys_file: Path = _setting(
        "",
        lambda text: setting_types.path(text) if text else None,
        "Who may call: a name and the SHA-256 of a key a line. Default: client-keys beside the token file.",
    )
    allow_anonymous: bool = _setting(
        "0",
        setting_types.flag,
        "1: serve without client keys on an address that is not loopback. Everyone who reaches it spends your quota.",
    )
    allowed_hosts: frozenset[str] = _setting(
        "",
        setting_types.hosts,
        "Host names, with commas between, under which callers without a key may address the proxy.",
    )
    allowed_origins: frozenset[str] = _setting(
        "",
        setting_types.origins,
        "Origins of web pages, with commas between, that may call the proxy without a key.",
    )
    connect_timeout: float = _setting(
        "10",
        setting_types.seconds(0.1, 600),
        "Seconds for a connection to upstream: name, all its addresses and TLS together.",
    )
    idle_timeout: float = _setting(
        "3600",
        setting_types.seconds(0.1, 86400),
        "Seconds without a byte from upstream, or of a client that takes none of those that wait for it, before it is given "
        "up. Reasoning models may be silent for long.",
    )
    sse_keepalive: float = _setting(
        "0",
        setting_types.seconds(0, 3600),
        "Seconds of silence in an event stream after which the proxy sends a comment; 0: never. For clients that cut "
        "off long reasoning. A comment cannot help before the head of the answer. Upstream is then asked not to "
        "compress.",
    )
    client_timeout: float = _setting(
        "30",
        setting_types.seconds(0.1, 3600),
        "Seconds that a client has to send its request head, and between two reads of its body; also those in which it "
        "reads nothing of an answer that the proxy gives itself.",
    )
    keepalive_timeout: float = _setting(
        "600",
        setting_types.seconds(0.1, 3600),
        "Seconds that an idle client connection stays open. Longer than clients keep theirs, or a request meets the "
        "close; answers announce a few seconds less (Keep-Alive: timeout=).",
    )
    max_connections: int = _setting(
        "10000",
        setting_types.whole(1, 1000000),
        "Client connections at once. For one more the longest idle is closed; when all have a request, the proxy "
        "answers health checks only and everything else with 503. Lowered to fit the file descriptor limit.",
    )
    replay_limit: int = _setting(
        "16777216",
        setting_types.whole(0, 1 << 40),
        "Bytes of one request body kept so that it can be sent again with a new token. A longer one streams through.",
    )
    replay_memory: int = _setting(
        "268435456",
        setting_types.whole(0, 1 << 40),
        "Bytes kept for that of all requests together.",
    )
    drain_timeout: float = _setting(
        "25",
        setting_types.seconds(0, 3500),
        "Seconds that open streams get to finish after SIGTERM.",
    )
    log_level: str = _setting(
        "info",
        setting_types.one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error.",
    )
    log_format: str = _setting(
        "auto",
        setting_types.one_of("auto", "text", "json"),
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
        dotenv_file.read(dotenv_path, PREFIX, complain, warnings.append),
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
                        f"{name if name.isprintable() else setting_types.shown(name)} is not a setting"
                        + (
                            f"; did you mean {PREFIX}{near[0]}?"
                            if near
                            else "; conf/xaiproxy.env.example lists them all"
                        ),
                        PREFIX + near[0] if near else name,
                    )
                )
            elif setting_types.QUOTED.fullmatch(text):
                complain(errors.ConfigurationError(f"{spelling} {setting_types.QUOTES_KEPT}", name))
            else:
                given[name], spelt[name] = text, spelling
    values = {
        field.name: _value(spelt.get(name, name), given.get(name), field.metadata, complain)
        for name, field in SETTINGS.items()
    }
    if values["client_keys_file"] is None:
        values["client_keys_file"] = values["token_path"].parent / "client-keys"
    return Config(
        egress=Egress.from_environ(environ, complain),
        warnings=tuple(dict.fromkeys(warnings)),
        **values,
    )


def _value(name: str, text: str | None, about: Mapping[str, Any], complain: Callable) -> Any:
    chosen = about["default"] if text is None else text
    try:
        return about["parse"](chosen)
    except ValueError as error:
        wrong = errors.ConfigurationError(
            f"{name} is {setting_types.shown(chosen)}, but takes {error}", name
        )
    if text is None:
        raise wrong
    complain(wrong)
    return _value(name, None, about, complain)


def _ours(environ: Mapping[str, str]) -> dict[str, str]:
    aliases = {name: environ[name] for name in ALIASES if name in environ}
    return aliases | {name: text for name, text in environ.items() if name.startswith(PREFIX)}


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
