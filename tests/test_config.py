"""The settings: their sources, the values that each accepts, and that no secret is repeated."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import certifi
import pytest
from checkout import ROOT

from xaiproxy import config, errors, setting_types
from xaiproxy.addresses import UnixSocket
from xaiproxy.egress import Egress
from xaiproxy.setting_types import SecretName

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a file to another user"
)


def settings(environ=(), options=None, dotenv_path=os.devnull, **values):
    environ = {**dict(environ), **{f"XAI_PROXY_{name}": value for name, value in values.items()}}
    return config.from_environ({"HOME": "/home/me", **environ}, options, dotenv_path)


def refusal(environ=(), **values) -> str:
    with pytest.raises(errors.ConfigurationError) as caught:
        settings(environ, **values)
    assert caught.value.exit_code == 78
    return str(caught.value)


def elsewhere(folder, what: str, **environ) -> str:
    """A setting as text, in a new process with that working directory and environment."""
    code = f"import os; from xaiproxy import config; print(config.from_environ(os.environ).{what})"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), **environ},
        cwd=folder,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.rstrip("\n")


# values


def test_the_settings_have_their_defaults():
    assert elsewhere("/", "token_path", HOME="/home/me") == "/home/me/.xai-proxy/tokens.json"
    defaults = settings()
    assert defaults.client_keys_file == defaults.token_path.parent / "client-keys"
    assert (defaults.bind, defaults.port, defaults.refresh_skew, defaults.redirect_port) == (
        "127.0.0.1",
        9090,
        120,
        56121,
    )
    assert (defaults.upstream, defaults.issuer) == ("https://api.x.ai", "https://auth.x.ai")
    assert (defaults.allow_anonymous, defaults.allowed_hosts, defaults.allowed_origins) == (
        False,
        frozenset(),
        frozenset(),
    )
    assert defaults.egress == Egress(None, "", certifi.where()) and defaults.warnings == ()


TAKES = {
    "TOKEN_PATH": [("/a/b", pathlib.Path("/a/b")), ("b", pathlib.Path.cwd() / "b")],
    "BIND": [
        ("0.0.0.0", "0.0.0.0"),
        ("::", "::"),
        ("[::1]", "::1"),
        ("localhost", "127.0.0.1"),
        ("unix:/" + 102 * "a", UnixSocket(pathlib.Path("/" + 102 * "a"))),
        ("unix:/a b,group=staff", UnixSocket(pathlib.Path("/a b"), "staff")),
    ],
    "PORT": [("0", 0), ("65535", 65535)],
    "UPSTREAM": [
        ("https://API.x.ai/", "https://api.x.ai"),
        ("http://127.0.0.1:80", "http://127.0.0.1:80"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("http://localhost", "http://localhost"),
    ],
    "ISSUER": [
        ("https://login.example/realm/", "https://login.example/realm"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
    ],
    "CLIENT_ID": [("a", "a"), ("!~", "!~")],
    "SCOPE": [("one", "one"), ("one two", "one two")],
    "REDIRECT_PORT": [("0", 0), ("65535", 65535)],
    "REFRESH_SKEW": [("1", 1), ("86400", 86400), ("1.5", 1.5)],
    "CLIENT_KEYS_FILE": [("/k", pathlib.Path("/k"))],
    "ALLOW_ANONYMOUS": [("0", False), ("1", True)],
    "NOTIFY_URL": [
        (url, url)
        for url in (
            "http://hook.example",
            "https://me:pass-word@hook.example:8443/services/secret-path?key=secret",
            "http://10.0.0.1:9093/hook",
            "http://[fd00::1]/",
        )
    ],
    "PUBLISH": [
        ("file:/shared/tokens.json", pathlib.Path("/shared/tokens.json")),
        ("kubernetes-secret:my-apps/xai.login", SecretName("my-apps", "xai.login")),
    ],
    "ASK_BIND": [("0.0.0.0:9092", ("0.0.0.0", 9092)), ("[::1]:0", ("::1", 0))],
    "REFRESHER": [
        ("http://refresher.apps.svc:9092/", "http://refresher.apps.svc:9092"),
        ("https://[fd00::1]", "https://[fd00::1]"),
    ],
    "ALLOWED_HOSTS": [("A.example., b_c,[::1],", frozenset(("a.example", "b_c", "[::1]")))],
    "ALLOWED_ORIGINS": [
        ("https://A.example, http://b:81", frozenset(("https://a.example", "http://b:81"))),
        ("app://localhost", frozenset(("app://localhost",))),
    ],
    "ADMIN_BIND": [
        ("0.0.0.0:9091", ("0.0.0.0", 9091)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("127.0.0.1", 65535)),
    ],
    "CONNECT_TIMEOUT": [("0.1", 0.1), ("600", 600)],
    "IDLE_TIMEOUT": [("0.1", 0.1), ("86400", 86400)],
    "CLIENT_TIMEOUT": [("0.1", 0.1), ("3600", 3600)],
    "KEEPALIVE_TIMEOUT": [("0.1", 0.1), ("3600", 3600)],
    "MAX_CONNECTIONS": [("1", 1), ("1000000", 1000000)],
    "SSE_KEEPALIVE": [("0", 0), ("3600", 3600)],
    "CACHE_AFFINITY": [("0", False), ("1", True)],
    "REPLAY_LIMIT": [("0", 0), ("1099511627776", 1 << 40)],
    "REPLAY_MEMORY": [("0", 0), ("1099511627776", 1 << 40)],
    "DRAIN_DELAY": [("0", 0), ("300", 300)],
    "DRAIN_TIMEOUT": [("0", 0), ("3500", 3500)],
    "LOG_LEVEL": [("debug", "debug"), ("error", "error")],
    "LOG_FORMAT": [("auto", "auto"), ("json", "json"), ("text", "text")],
}
REFUSES = {
    "ADMIN_BIND": [
        "127.0.0.1",
        "127.0.0.1:",
        ":9091",
        "::1:9091",
        "9091",
        "127.0.0.1:65536",
        "admin.example:9091",
        "unix:/admin",
    ],
    "TOKEN_PATH": ["/", "a\0b", "~nosuchuser/tokens.json"],
    "BIND": [
        "example.org",
        "127.0.0.1:80",
        "1",
        "256.0.0.1",
        "unix:",
        "unix:/",
        "unix:/folder/",
        "unix:/socket,group=",
        "unix:/socket,mode=0666",
        "unix:/socket,group=a,group=b",
        "unix:/" + 103 * "a",
    ],
    "PORT": ["-1", "65536", "0x50", "1.0", "9" * 5000, "²", " 1", "http"],
    "UPSTREAM": [
        "http://api.x.ai",
        "https://api.x.ai/v1",
        "https://",
        "api.x.ai",
        "ftp://x.ai",
        "https://x.ai:99999",
        "https://x.ai?",
        "https://x.ai#",
        "https://a@x.ai",
        "https://x .ai",
        "https://[::1",
        "https://\u0435.ai",
        *(
            f"https://evil.example{cut}.x.ai"
            for cut in ("\\", "%2f", "%00", ",", ";", "|", "&", "'", "*")
        ),
    ],
    "ISSUER": [
        "http://auth.x.ai",
        "https://auth.x.ai/?a",
        "auth.x.ai",
        "https://127.0.0.1\n",
        "http://127.0.0.1.evil.example",
    ],
    "CLIENT_ID": ["a b", "é", "a\n"],
    "SCOPE": ["a  b", " a", "a ", 'a"b', "a\\b"],
    "REDIRECT_PORT": ["-1", "65536"],
    "REFRESH_SKEW": ["0.9", "86400.1", "-5", "nan", "inf", "1e3", "two"],
    "CLIENT_KEYS_FILE": ["a\0b"],
    "ALLOW_ANONYMOUS": ["2", "true", "yes"],
    # See test_a_wrong_url_of_calls_is_refused_without_its_value.
    "NOTIFY_URL": [],
    "PUBLISH": [
        "file:",
        "file:relative",
        "file:/",
        "/shared/tokens.json",
        "kubernetes-secret:name",
        "kubernetes-secret:apps/",
        "kubernetes-secret:a.b/name",
        "kubernetes-secret:apps/a/b",
        "kubernetes-secret:apps/Name",
        "kubernetes-secret:apps/a..b",
        f"kubernetes-secret:{64 * 'a'}/b",
        f"kubernetes-secret:a/{254 * 'b'}",
        "secret:apps/name",
    ],
    "ASK_BIND": ["9092", "refresher:9092", "unix:/ask"],
    "REFRESHER": [
        "refresher:9092",
        "ftp://refresher",
        "http://",
        "http://refresher:0",
        "http://refresher:99999",
        "http://me:secret@refresher",
        "http://refresher/refused",
        "http://refresher?a",
        "http://refresher#a",
        "http://a b",
    ],
    "ALLOWED_HOSTS": ["a.example:80", "http://a", "*", "a b"],
    "ALLOWED_ORIGINS": ["a.example", "*", "https://a/b", "null"],
    "CONNECT_TIMEOUT": ["0.09", "600.1"],
    "IDLE_TIMEOUT": ["0", "86401"],
    "CLIENT_TIMEOUT": ["0", "3601"],
    "KEEPALIVE_TIMEOUT": ["0", "3601"],
    "MAX_CONNECTIONS": ["0", "1000001"],
    "SSE_KEEPALIVE": ["-1", "3600.1"],
    "CACHE_AFFINITY": ["2", "yes"],
    "REPLAY_LIMIT": ["-1", "1099511627777"],
    "REPLAY_MEMORY": ["-1", "16MB"],
    "DRAIN_DELAY": ["300.1", "-1"],
    "DRAIN_TIMEOUT": ["3500.1", "-1"],
    "LOG_LEVEL": ["INFO", "trace"],
    "LOG_FORMAT": ["xml"],
}


@pytest.mark.parametrize("name", [name.removeprefix("XAI_PROXY_") for name in config.SETTINGS])
def test_each_setting_accepts_its_range_and_nothing_beyond(name):
    for text, value in TAKES[name]:
        assert getattr(settings(**{name: text}), name.lower()) == value
    for text in REFUSES[name]:
        refused = refusal(**{name: text})
        shown = "***@" + text.split("@")[1] if "@" in text else text
        assert refused.startswith(f"XAI_PROXY_{name} must be "), refused
        assert refused.endswith(f", not {shown!r}"), refused


def test_the_url_of_calls_is_not_in_a_repr():
    assert "secret" not in repr(settings(NOTIFY_URL="https://secret@h/secret"))


@pytest.mark.parametrize(
    "url",
    [
        "hook.example/secret-path",
        "ftp://hook.example/secret-path",
        "https:///secret-path",
        "https://me:secret@hook.example:99999/",
        "https://me:secret@hook.example:0/",
        "https://hook.example/secret-path#part",
        "https://hook.example/secret path",
        "https://me:secret@[::1/",
        "https://secret\\@hook.example@",
    ],
)
def test_a_wrong_url_of_calls_is_refused_without_its_value(url):
    message = "XAI_PROXY_NOTIFY_URL must be an http or https URL without a fragment"
    assert refusal(NOTIFY_URL=url) == message


def test_http_proxy_is_used_only_with_a_plain_url_of_calls():
    environ = {"HTTP_PROXY": "http://p:1"}
    assert settings(environ, NOTIFY_URL="http://hook.example").egress.http_proxy == "http://p:1"
    assert settings(environ, NOTIFY_URL="https://hook.example").egress.http_proxy is None
    assert settings({"HTTP_PROXY": "nonsense://"}).egress.http_proxy is None


@pytest.mark.parametrize(
    "environ, url",
    [
        ({}, ""),
        ({"KUBERNETES_SERVICE_PORT": "443"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "https://10.0.0.1:443"),
        (
            {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"},
            "https://[fd00::1]:6443",
        ),
    ],
)
def test_the_api_server_is_that_of_the_pod(environ, url):
    assert settings(environ).kubernetes_api == url


def test_an_instance_is_named_by_its_pods_uid_or_its_host():
    assert settings({"POD_UID": "0c2d"}).instance == "0c2d"
    assert settings().instance == socket.gethostname()


def test_the_endpoint_of_traces_is_opentelemetrys_and_is_not_in_a_repr():
    general, traces = "http://me:secret@otel:4318", "https://me:secret@traces/v1/traces"
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": general, "HTTP_PROXY": "http://p:1"}
    found = settings(environ)
    assert found.otlp_endpoint == general and found.egress.http_proxy == "http://p:1"
    found = settings({**environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces})
    assert found.otlp_endpoint == traces and found.egress.http_proxy is None
    assert settings().otlp_endpoint == "" and "secret" not in repr(found)


def test_the_client_keys_are_beside_the_token_file():
    assert settings(TOKEN_PATH="/data/login").client_keys_file == pathlib.Path("/data/client-keys")


def test_the_working_directory_may_be_the_root():
    assert elsewhere("/", "token_path", XAI_PROXY_TOKEN_PATH="t") == "/t"


def test_the_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().port = 1


def test_the_example_is_generated_from_the_code():
    assert (ROOT / "conf" / "xaiproxy.env.example").read_text() == config.example()


def test_the_example_has_the_defaults(tmp_path):
    lines = (
        line[1:] if line.startswith("#XAI") else line for line in config.example().splitlines()
    )
    (tmp_path / "env").write_text("\n".join(lines))
    assert settings(dotenv_path=str(tmp_path / "env")) == settings()


# sources


def test_an_option_wins_over_the_environment_over_dotenv_over_the_default(tmp_path):
    (tmp_path / "env").write_text(
        "XAI_PROXY_PORT=1\nXAI_PROXY_BIND=::1\nXAI_PROXY_SCOPE=dotenv\nOTHER=x\n"
        "HTTPS_PROXY=http://not-from-here:1\nAUTH_PROXY_TOKEN_PATH=/not/from/here\n"
    )
    chosen = settings(
        {"XAI_PROXY_PORT": "2", "XAI_PROXY_BIND": "::2", "XAI_PROXY_SCOPE": ""},
        {"XAI_PROXY_PORT": "3", "XAI_PROXY_BIND": None},
        str(tmp_path / "env"),
    )
    assert (chosen.port, chosen.bind, chosen.scope, chosen.redirect_port) == (
        3,
        "::2",
        "dotenv",
        56121,
    )
    assert chosen.egress.proxy is None and chosen.token_path.name == "tokens.json"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_value_in_quotes_is_refused(quote):
    """docker's --env-file keeps them; a path would begin with a folder of that name."""

    def sentence(name):
        return f"{name} {setting_types.QUOTES_KEPT}"

    assert "begins and ends with a quote" in setting_types.QUOTES_KEPT
    quoted = f"{quote}/secret/tokens.json{quote}"
    for name in config.SETTINGS:
        assert refusal({name: quoted}) == sentence(name)
    for name in ("AUTH_PROXY_TOKEN_PATH", "HTTPS_PROXY", "all_proxy", "NO_PROXY", "SSL_CERT_FILE"):
        assert refusal({name: quoted}) == sentence(name)
    with pytest.raises(errors.ConfigurationError, match=sentence("XAI_PROXY_TOKEN_PATH")):
        settings(options={"XAI_PROXY_TOKEN_PATH": quoted})


def test_a_quote_within_a_value_is_a_part_of_it():
    assert settings(TOKEN_PATH='/it\'s/"tokens"').token_path == pathlib.Path('/it\'s/"tokens"')


def test_the_older_name_of_the_token_path_is_accepted():
    assert settings({"AUTH_PROXY_TOKEN_PATH": "/old"}).token_path == pathlib.Path("/old")
    assert settings(
        {"AUTH_PROXY_TOKEN_PATH": "/old"}, TOKEN_PATH="/new"
    ).token_path == pathlib.Path("/new")
    assert settings({"AUTH_PROXY_TOKEN_PATH": "/old"}, TOKEN_PATH="").token_path == pathlib.Path(
        "/old"
    )


# names


def test_an_unknown_name_is_refused_with_the_nearest_and_without_its_value():
    assert refusal(PROT="1") == "XAI_PROXY_PROT is not a setting; did you mean XAI_PROXY_PORT?"
    assert refusal(WHATEVER_THIS="secret") == (
        "XAI_PROXY_WHATEVER_THIS is not a setting; conf/xaiproxy.env.example lists them all"
    )


def test_an_unknown_name_in_dotenv_is_refused_too(tmp_path):
    (tmp_path / "env").write_text("XAI_PROXY_PROT=1\n")
    with pytest.raises(errors.ConfigurationError, match="XAI_PROXY_PROT is not"):
        settings(dotenv_path=str(tmp_path / "env"))


@pytest.mark.parametrize("service", ["", "REFRESHER_", "REFRESHER_2_"])
def test_variables_of_kubernetes_services_of_our_name_are_ignored(service):
    pod = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "9090",
        "SERVICE_PORT_HTTP": "9090",
        "PORT": "tcp://10.0.0.1:9090",
        "PORT_9090_TCP": "tcp://10.0.0.1:9090",
        "PORT_9090_TCP_PROTO": "tcp",
        "PORT_9090_TCP_PORT": "9090",
        "PORT_9090_TCP_ADDR": "10.0.0.1",
    }
    assert settings(**{service + name: text for name, text in pod.items()}) == settings()
    assert "PORT_X" in refusal(PORT_X="1")


def test_names_of_clients_and_rivals_are_ignored_with_one_warning_each():
    chosen = settings(
        {"XAI_PROXY_KEY": "secret"},
        {"XAI_PROXY_KEY": "secret"},
        API_KEY="secret",
        BASE_URL="x",
        OUTBOUND="",
    )
    assert [warning.split()[0] for warning in chosen.warnings] == [
        "XAI_PROXY_KEY",
        "XAI_PROXY_API_KEY",
        "XAI_PROXY_BASE_URL",
    ]
    assert "secret" not in repr(chosen)


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@api.x.ai", "https://me:se/cret@api.x.ai", "me:secret@x", "//me:secret@x"],
)
def test_a_password_in_a_url_is_not_repeated(url):
    for name in ("UPSTREAM", "ISSUER", "BIND"):
        refused = refusal(**{name: url})
        assert "cret" not in refused and "me:" not in refused


def test_every_wrong_setting_can_be_collected_and_then_has_its_default(tmp_path):
    (tmp_path / "env").write_bytes(b"XAI_PROXY_PORT=\xff\n")
    wrong: list[errors.ConfigurationError] = []
    environ = {
        "XAI_PROXY_PORT": "http",
        "XAI_PROXY_BIND": "::1",
        "XAI_PROXY_ISUER": "x",
        "XAI_PROXY_WHATEVER_THIS": "x",
        "all_proxy": "ftp://p",
        "SSL_CERT_FILE": "/none",
    }
    chosen = config.from_environ(environ, dotenv_path=str(tmp_path / "env"), complain=wrong.append)
    assert chosen == settings(BIND="::1")
    assert [error.setting for error in wrong] == [
        "XAI_PROXY_PORT",
        "XAI_PROXY_ISSUER",
        "XAI_PROXY_WHATEVER_THIS",
        "XAI_PROXY_PORT",
        "ALL_PROXY",
        "SSL_CERT_FILE",
    ]


@pytest.mark.parametrize("name", ["TOKEN_PATH", "CLIENT_KEYS_FILE"])
def test_a_folder_in_a_files_place_is_refused(tmp_path, name):
    """Such as a volume; the files beside it would be made outside of it."""
    for text in (str(tmp_path), f"{tmp_path}/not-yet/"):
        with pytest.raises(
            errors.ConfigurationError,
            match=f"XAI_PROXY_{name} must be the path of a file in that folder, not '{text}'",
        ):
            config.from_environ({f"XAI_PROXY_{name}": text})
