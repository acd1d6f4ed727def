"""The settings: one frozen object, made once and handed down.

No other module reads XAI_PROXY_* variables or .env.

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
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from xaiproxy import dotenv_file, errors, setting_types
from xaiproxy.addresses import UnixSocket
from xaiproxy.egress import Egress

PREFIX = "XAI_PROXY_"
DEFAULT_ISSUER = "https://auth.x.ai"
DEFAULT_CLIENT_ID = "b1a00492-073a-47ea-816f-4c329264a828"
ALIASES = {"AUTH_PROXY_TOKEN_PATH": PREFIX + "TOKEN_PATH"}
# Kubernetes sets these in every pod beside a Service called xai-proxy or xai-proxy-NAME.
KUBERNETES_VARIABLE = re.compile(
    r"XAI_PROXY_([A-Z0-9_]+_)?(PORT=(tcp|udp|sctp)://.*"
    r"|(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)=.*)",
    re.DOTALL,
)
# Settings of clients and of other proxies.
FOREIGN_NAMES = frozenset(PREFIX + name for name in ("KEY", "API_KEY", "BASE_URL", "OUTBOUND"))
# Connections beyond MAX_CONNECTIONS, none of which gets a connection to upstream.
RESERVE = 16
# File descriptors for logs, the token file, the event loop, the libraries and the admin listener.
SPARE_DESCRIPTORS = 64

# OpenTelemetry's settings, the first of which counts.
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Complain = Callable[[errors.ConfigurationError], object]


def descriptors_for(connections: int) -> int:
    """File descriptors for so many client connections, each with a connection to upstream."""
    return 2 * connections + RESERVE + SPARE_DESCRIPTORS


def connections_within(descriptors: int) -> int:
    """Client connections that fit in a file descriptor limit."""
    return max(1, (descriptors - RESERVE - SPARE_DESCRIPTORS) // 2)


# RUF009 does not see that this returns a dataclasses.field.
def _setting(default: str, parse: Callable[[str], Any], meaning: str, secret: bool = False) -> Any:
    """`secret`: whether its value is in no message."""
    return dataclasses.field(
        repr=not secret,
        metadata={"default": default, "parse": parse, "meaning": meaning, "secret": secret},
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, in the order of conf/xaiproxy.env.example. Times are seconds, sizes bytes."""

    token_path: Path = _setting(  # noqa: RUF009
        "~/.xai-proxy/tokens.json",
        setting_types.path,
        "The token file. Its folder is created with mode 0700 if it does not exist.",
    )
    bind: str | UnixSocket = _setting(  # noqa: RUF009
        "127.0.0.1",
        setting_types.address,
        "IP address to listen on; any other than loopback requires a client key: xai-client-key "
        "add NAME. Or unix:/path, a Unix socket to which only this user may connect (mode 0600); "
        "with unix:/path,group=NAME that group may, too (0660).",
    )
    port: int = _setting(
        "9090",
        setting_types.whole(0, 65535),
        "TCP port to listen on; 0: any free port, which the log names. A Unix socket has none.",
    )
    admin_bind: tuple[str, int] | None = _setting(
        "",
        setting_types.host_and_port,
        "IP address and port, such as 127.0.0.1:9091, of a second listener for /healthz, /readyz "
        "and /metrics only. They require no client key there, have connections of their own, and "
        "/metrics has no names of client keys unless one is sent; port 0: any free port, which the "
        "log names.",
    )
    upstream: str = _setting(
        "https://api.x.ai",
        setting_types.origin,
        "Origin of the API; the path and query of each request are appended.",
    )
    issuer: str = _setting(
        DEFAULT_ISSUER,
        setting_types.issuer,
        "OpenID issuer, whose metadata is at /.well-known/openid-configuration. "
        "A login belongs to its issuer.",
    )
    client_id: str = _setting(
        DEFAULT_CLIENT_ID,
        setting_types.client_id,
        "OAuth client. xAI registers no others; this is the Grok CLI's public one.",
    )
    scope: str = _setting(
        "openid profile email offline_access grok-cli:access api:access",
        setting_types.scope,
        "OAuth scope that a login requests.",
    )
    redirect_port: int = _setting(
        "56121",
        setting_types.whole(0, 65535),
        "Loopback port of the browser login; another free port is used if it is taken.",
    )
    refresh_skew: float = _setting(
        "120",
        setting_types.seconds(1, 86400),
        "Seconds: a token is renewed at least this long before it expires; "
        "a fifth of its lifetime if that is more.",
    )
    notify_url: str = _setting(
        "",
        setting_types.notify_url,
        "URL, http or https, to which the refresher sends a POST when a person is needed: "
        "sign_in_needed, renewal_failing (for half of the time that the access token had left), "
        "recovered; as JSON with event, message, at (unix seconds) and host. Retried each minute "
        "until a response is 2xx. Only its scheme, host and port are ever logged. "
        "xai-refresher --once sends nothing: it has its exit status.",
        secret=True,
    )
    publish: Path | setting_types.SecretName | None = _setting(  # noqa: RUF009
        "",
        setting_types.publish,
        "Where the refresher keeps a copy of the login without its refresh token, for proxies on "
        "other machines: file:/path, replaced at once, which anything may distribute; or "
        "kubernetes-secret:NAMESPACE/NAME, key tokens.json of a Secret, from inside the cluster. "
        "A failure to publish is retried, and fails no refresh.",
    )
    ask_bind: tuple[str, int] | None = _setting(
        "",
        setting_types.host_and_port,
        "IP address and port, such as 0.0.0.0:9092, at which proxies on other machines ask the "
        "refresher for another access token (XAI_PROXY_REFRESHER), and it serves its own /healthz, "
        "/readyz and /metrics, all without a client key; port 0: any free port, which the log "
        "names.",
    )
    refresher: str = _setting(
        "",
        setting_types.refresher,
        "Where a proxy whose token file holds no refresh token asks for another access token when "
        "the API refuses its own: URL of a refresher's XAI_PROXY_ASK_BIND, such as "
        "http://xaiproxy-refresher:9092. Plain http is accepted, since only the SHA-256 of the "
        "refused token is sent. Never reached through HTTPS_PROXY.",
    )
    client_keys_file: Path = _setting(  # noqa: RUF009
        "",
        lambda text: setting_types.path(text) if text else None,
        "The client keys: a name and the SHA-256 of a key on each line. "
        "Default: client-keys beside the token file.",
    )
    allow_anonymous: bool = _setting(
        "0",
        setting_types.flag,
        "1: serve without client keys on an address that is not loopback. "
        "Every client that reaches it spends your quota.",
    )
    allowed_hosts: frozenset[str] = _setting(
        "",
        setting_types.hosts,
        "Host names, separated by commas, under which clients without a key may address the proxy.",
    )
    allowed_origins: frozenset[str] = _setting(
        "",
        setting_types.origins,
        "Origins, separated by commas, whose web pages may call the proxy without a key.",
    )
    connect_timeout: float = _setting(
        "10",
        setting_types.seconds(0.1, 600),
        "Seconds for a connection to upstream: name resolution, all addresses and the TLS "
        "handshake together.",
    )
    idle_timeout: float = _setting(
        "3600",
        setting_types.seconds(0.1, 86400),
        "Seconds without progress, in either direction, before a request is aborted. "
        "Reasoning models may be silent for long.",
    )
    sse_keepalive: float = _setting(
        "0",
        setting_types.seconds(0, 3600),
        "Seconds of silence in an event stream before the proxy sends a heartbeat (a comment); "
        "0: never. For clients that time out while a model is thinking. No heartbeat can be sent "
        "before the response head. Upstream is asked for an uncompressed response.",
    )
    cache_affinity: bool = _setting(
        "1",
        setting_types.flag,
        "1: on the way to *.x.ai, a request without x-grok-conv-id gets one that is derived from "
        "the client's own session header, so that xAI can route a conversation to the server that "
        "has cached it; 0: never.",
    )
    client_timeout: float = _setting(
        "30",
        setting_types.seconds(0.1, 3600),
        "Seconds for a client to send its request head, between two reads of its body, and "
        "without reading anything of a response that the proxy makes itself.",
    )
    keepalive_timeout: float = _setting(
        "600",
        setting_types.seconds(0.1, 3600),
        "Seconds that an idle client connection stays open. Choose more than clients keep theirs, "
        "or a request meets the close; responses announce a few seconds less "
        "(Keep-Alive: timeout=).",
    )
    max_connections: int = _setting(
        "10000",
        setting_types.whole(1, 1000000),
        "Client connections at once. For one more, the longest idle one is closed; when every "
        "connection has a request, the proxy answers only health checks, and all else with 503. "
        "Lowered to fit the file descriptor limit.",
    )
    replay_limit: int = _setting(
        "16777216",
        setting_types.whole(0, 1 << 40),
        "Bytes of one request body kept so that it can be sent again with a new token. "
        "A longer body is streamed only.",
    )
    replay_memory: int = _setting(
        "268435456",
        setting_types.whole(0, 1 << 40),
        "Bytes kept for that, of all requests together.",
    )
    drain_delay: float = _setting(
        "0",
        setting_types.seconds(0, 300),
        "Seconds after SIGTERM in which new connections are still served, with Connection: close, "
        "while /readyz returns 503: for load balancers that stop sending only then (Kubernetes). "
        "The drain begins after them, so a stop timeout must have room for both. A second signal "
        "skips the rest of both.",
    )
    drain_timeout: float = _setting(
        "25",
        setting_types.seconds(0, 3500),
        "Seconds for open responses to finish after SIGTERM.",
    )
    log_level: str = _setting(
        "info",
        setting_types.one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error.",
    )
    log_format: str = _setting(
        "auto",
        setting_types.one_of("auto", "text", "json"),
        "text, json, or auto: text on a terminal, also under a supervisord that runs on one; "
        "otherwise JSON.",
    )

    egress: Egress = dataclasses.field(default_factory=Egress)
    # OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, which may hold a password.
    otlp_endpoint: str = dataclasses.field(default="", repr=False)
    # The API server of the cluster that this process runs in, or "".
    kubernetes_api: str = ""
    # A name of this pod or machine that no other has.
    instance: str = ""
    # main logs them once logging is set up.
    warnings: tuple[str, ...] = ()

    @property
    def has_known_address(self) -> bool:
        """Whether clients find the proxy by the settings alone."""
        return isinstance(self.bind, UnixSocket) or self.port != 0


SETTINGS = {
    PREFIX + field.name.upper(): field for field in dataclasses.fields(Config) if field.metadata
}


def _refuse(error: errors.ConfigurationError) -> NoReturn:
    raise error


def from_environ(
    environ: Mapping[str, str],
    options: Mapping[str, str | None] | None = None,
    dotenv_path: str = ".env",
    complain: Complain = _refuse,
) -> Config:
    """Return the Config, or raise ConfigurationError.

    `options`: setting name to text; None means not given.
    `complain`: called instead with the error of each wrong setting, which then counts as not set. A
    default that is wrong here (no home directory) is raised all the same.
    """
    given: dict[str, tuple[str, str]] = {}
    warnings: list[str] = []
    for source in (
        dotenv_file.read(dotenv_path, PREFIX, complain, warnings.append),
        environ,
        options or {},
    ):
        for spelling, text in _in_precedence(source):
            name = ALIASES.get(spelling, spelling)
            if name in FOREIGN_NAMES:
                warnings.append(f"{name} is not a setting of xaiproxy and is ignored")
            elif name not in SETTINGS:
                complain(_unknown(name))
            elif setting_types.QUOTED.fullmatch(text):
                complain(errors.ConfigurationError(f"{spelling} {setting_types.QUOTES_KEPT}", name))
            else:
                given[name] = spelling, text
    values = {
        field.name: _value(name, field.metadata, given.get(name), complain)
        for name, field in SETTINGS.items()
    }
    if values["client_keys_file"] is None:
        values["client_keys_file"] = values["token_path"].parent / "client-keys"
    otlp_endpoint = next(filter(None, map(environ.get, OTLP_ENDPOINTS)), "")
    plain_http = any(url.startswith("http:") for url in (values["notify_url"], otlp_endpoint))
    return Config(
        egress=Egress.from_environ(environ, complain, plain_http),
        otlp_endpoint=otlp_endpoint,
        kubernetes_api=_kubernetes_api(environ),
        # A container that is restarted keeps its pod's UID; a pod that replaces it has another.
        instance=environ.get("POD_UID") or socket.gethostname(),
        warnings=tuple(dict.fromkeys(warnings)),
        **values,
    )


def _kubernetes_api(environ: Mapping[str, str]) -> str:
    host = environ.get("KUBERNETES_SERVICE_HOST", "")
    port = environ.get("KUBERNETES_SERVICE_PORT", "443")
    return host and f"https://{f'[{host}]' if ':' in host else host}:{port}"


def _in_precedence(source: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Our variables that are set, the later ones overriding the earlier: aliases come first."""
    for name in (*ALIASES, *(name for name in source if name.startswith(PREFIX))):
        text = source.get(name)
        if text and not KUBERNETES_VARIABLE.fullmatch(f"{name}={text}"):
            yield name, text


def _unknown(name: str) -> errors.ConfigurationError:
    shown = name if name.isprintable() else setting_types.shown(name)
    ours = [known.removeprefix(PREFIX) for known in SETTINGS]
    for near in difflib.get_close_matches(name.removeprefix(PREFIX), ours, 1):
        meant = PREFIX + near
        return errors.ConfigurationError(f"{shown} is not a setting; did you mean {meant}?", meant)
    return errors.ConfigurationError(
        f"{shown} is not a setting; conf/xaiproxy.env.example lists them all", name
    )


def _value(
    name: str, about: Mapping[str, Any], given: tuple[str, str] | None, complain: Complain
) -> Any:
    spelling, text = given or (name, about["default"])
    try:
        return about["parse"](text)
    except ValueError as error:
        message = f"{spelling} must be {error}"
        if not about["secret"]:
            message += f", not {setting_types.shown(text)}"
    (complain if given else _refuse)(errors.ConfigurationError(message, name))
    return _value(name, about, None, complain)


def example() -> str:
    """The text of conf/xaiproxy.env.example."""
    lines = [
        "# Every setting of xaiproxy with its default. Copy what you change to .env in the",
        "# working directory, or set it in the environment, which overrides .env. Seconds may have",
        "# decimals; sizes are bytes. An empty value counts as not set. An unknown XAI_PROXY_ name",
        "# is an error.",
    ]
    for name, field in SETTINGS.items():
        lines += ["", "# " + field.metadata["meaning"], f"#{name}={field.metadata['default']}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(example(), end="")
