"""What holds for anything from outside: the token file, settings, the issuer's responses, headers,
streams.

bin/test tries the same few hundred examples of each every time. bin/fuzz continues for as long as
it is asked to, guided by the lines of xaiproxy that an example reaches. A failure that it finds is
fixed, and becomes an @example here.
"""

import base64
import datetime
import decimal
import json
import math
import os
import re
import tempfile
from pathlib import Path

import requests
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st

from xaiproxy import config, errors, token_json, token_store, tokens
from xaiproxy.addresses import UnixSocket
from xaiproxy.http1 import framing, headers, message_head, response_head
from xaiproxy.oauth import discovery, session, token_endpoint
from xaiproxy.proxy import event_stream

XAI, LOOPBACK, OTHER = config.DEFAULT_ISSUER, "http://127.0.0.1:9191", "https://login.example"
NOW = 1.8e9
SECRET = "hunter2-hunter2"


def check_message(error: errors.Error) -> None:
    """Check that the error is one line, for a terminal, that repeats no secret."""
    assert re.fullmatch(r"[^\0-\x1f\x7f-\x9f\u202a-\u202e]+", str(error)) and SECRET not in str(
        error
    )


# Arbitrary values

# JSON can contain lone surrogates, too.
TEXT = st.text(st.characters(), max_size=20)
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)
NUMBERS = st.integers(0, 10**12) | st.integers() | st.floats()


def json_of(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    )


JSON = json_of(st.none() | st.booleans() | NUMBERS | TEXT)


def mostly(usual: st.SearchStrategy, others: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 4).flatmap(lambda chance: usual if chance < 4 else others)


def objects(**members: st.SearchStrategy) -> st.SearchStrategy:
    """JSON objects with these members, or some of them, or others."""
    some = st.fixed_dictionaries(
        {}, optional={name: mostly(good, JSON) for name, good in members.items()}
    )
    return st.builds(
        lambda others, ours: others | ours,
        st.dictionaries(TEXT, JSON, max_size=2),
        st.fixed_dictionaries(members) | some,
    )


def nested(value: object, depth: int) -> str:
    """The JSON of `value` in so many nested members."""
    text = json.dumps(value)
    if depth == 0 or text == "{}":
        return text
    return text.removesuffix("}") + ', "deep": ' + "[" * depth + "]" * depth + "}"


def written(values: st.SearchStrategy) -> st.SearchStrategy:
    """These values as the bytes of a file or body; and other bytes."""
    texts = st.builds(nested, values, mostly(st.just(0), st.integers(0, 2000)))
    encodings = st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
    encoded = st.builds(str.encode, mostly(texts, JSON.map(json.dumps)), encodings)
    return mostly(
        encoded, st.builds(lambda data, at: data[:at], encoded, st.integers(0, 300)) | st.binary()
    )


def jwt(claims: object) -> str:
    return f"a.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c"


TOKENS = st.from_regex("[A-Za-z0-9._~+/-]{1,20}=?", fullmatch=True) | objects(
    exp=NUMBERS, iat=NUMBERS
).map(jwt)
REFRESH_ERRORS = objects(
    code=TEXT, description=TEXT, at=NUMBERS, terminal=st.booleans(), retry_at=NUMBERS
)


# The token file

FILES = written(
    objects(
        access_token=TOKENS,
        refresh_token=PRINTABLE,
        expires_at=NUMBERS,
        token_endpoint=PRINTABLE,
        obtained_at=NUMBERS,
        issuer=st.just(XAI),
        client_id=st.just(config.DEFAULT_CLIENT_ID),
        scope=PRINTABLE,
        account=PRINTABLE,
        refresh_error=REFRESH_ERRORS,
        salt=PRINTABLE,
        replaces=TEXT,
    )
)


@given(FILES)
def test_any_token_file_is_a_login_or_a_state_and_a_rewrite_keeps_all_of_it(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.json")
        path.write_bytes(content)
        store = token_store.TokenStore(
            config.from_environ({"XAI_PROXY_TOKEN_PATH": str(path)}, None, os.devnull)
        )
        try:
            login = store.load()
        except errors.LoginUnusable as error:
            assert error.state in ("corrupt", "foreign")
            check_message(error)
            return
    values = json.loads(content)
    assert login.access_token == values["access_token"] and re.fullmatch(
        "[!-~]+", login.access_token
    )
    assert login.refresh_token == (values.get("refresh_token") or None)
    assert login.state(NOW, 120) in tokens.State and login.age(NOW) >= 0
    rewritten = json.loads(token_json.to_json(login, "mark"))
    assert {name: rewritten[name] for name in values if name not in token_json.KEYS} == NanIsNan(
        {name: value for name, value in values.items() if name not in token_json.KEYS}
    )
    assert token_json.to_json(
        token_json.from_json(token_json.to_json(login, "mark")), None
    ) == token_json.to_json(login, None)


class NanIsNan(dict):
    def __eq__(self, other):
        return repr(dict(self)) == repr(other)


TIMES = st.integers(0, 10**11 - 1) | st.floats(0, 1e11, exclude_max=True)
FINITE = json_of(st.none() | st.integers() | st.floats(allow_nan=False) | TEXT)
LOGINS = st.builds(
    tokens.Login,
    access_token=TOKENS,
    expires_at=TIMES,
    refresh_token=st.none() | PRINTABLE,
    token_endpoint=st.none() | PRINTABLE,
    obtained_at=st.none() | TIMES,
    issuer=PRINTABLE,
    client_id=PRINTABLE,
    scope=st.none() | PRINTABLE,
    account=st.none() | PRINTABLE,
    refresh_error=st.none()
    | st.builds(tokens.RefreshError, TEXT, TEXT, TIMES, st.booleans(), st.none() | TIMES),
    extra=st.dictionaries(
        TEXT.filter(lambda name: name not in token_json.KEYS), FINITE, max_size=3
    ),
)


@given(LOGINS, st.none() | PRINTABLE)
def test_a_login_survives_the_file(login, mark):
    text = token_json.to_json(login, mark)
    assert token_json.from_json(text) == token_json.from_json(text.encode()) == login
    assert token_json.replaces(text) == mark


# Settings

SETTING_TEXTS = (
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
    | PRINTABLE
    | st.integers(-1, 1 << 41).map(str)
    | st.floats(0, 100000).map(lambda value: f"{value:.3f}")
    | st.sampled_from(
        (
            "1",
            "info",
            "json",
            "/a/b",
            "~/a",
            "~nobody-here/a",
            "/",
            "::1",
            "localhost",
            "A.example., [::1]",
            "one two",
            "https://A.example, http://b:81",
            "https://Login.example/realm/",
            "http://127.0.0.1:1",
            "http://x.ai",
            f"https://user:{SECRET}@x.ai",
            f"http://user:{SECRET}@proxy.example:3128",
            f"http://user:{SECRET}@",
            "proxy.example:3128",
            os.devnull,
        )
    )
)
SETTING_NAMES = st.sampled_from(
    (
        *config.SETTINGS,
        *config.ALIASES,
        *config.FOREIGN_NAMES,
        "HTTPS_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "XAI_PROXY_SERVICE_HOST",
        "XAI_PROXY_PORT_80_TCP",
        "XAI_PROXY_PROT",
        "PATH",
    )
) | PRINTABLE.filter(lambda name: "=" not in name).map(lambda name: config.PREFIX + name)
# The two are names of one setting.
ENVIRONMENTS = st.dictionaries(SETTING_NAMES, SETTING_TEXTS, max_size=6).filter(
    lambda environ: not {"AUTH_PROXY_TOKEN_PATH", "XAI_PROXY_TOKEN_PATH"} <= set(environ)
)


def settings(environ, dotenv_path=os.devnull):
    """The Config, and the names of the variables in its errors."""
    complaints = []
    chosen = config.from_environ(environ, None, dotenv_path, complaints.append)
    for error in complaints:
        check_message(error)
    return chosen, complaints


def text_of(value) -> str:
    """The text that sets a setting to this value."""
    if value is None:
        return ""
    if isinstance(value, UnixSocket):
        return f"{value},group={value.group}" if value.group else str(value)
    if isinstance(value, tuple):
        host, port = value
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(value, frozenset):
        return ",".join(value)
    if isinstance(value, float):
        return format(decimal.Decimal(value), "f")
    return str(int(value)) if isinstance(value, bool) else str(value)


@example({"XAI_PROXY_CLIENT_KEYS_FILE": "~0"})
@given(ENVIRONMENTS)
def test_any_environment_is_a_config_or_an_error_that_names_its_variable(environ):
    chosen, complaints = settings(environ)
    named = {
        max((name for name in environ if str(error).startswith(name + " ")), key=len)
        for error in complaints
    }
    # Without them it is the same, and nothing is wrong.
    rest = {name: text for name, text in environ.items() if name not in named}
    assert config.from_environ(rest, None, os.devnull) == chosen
    assert SECRET not in repr(chosen.egress).replace(chosen.egress.no_proxy, "")


@given(ENVIRONMENTS)
def test_a_valid_text_sets_its_value(environ):
    chosen, _ = settings(environ)
    for origin in (chosen.upstream, chosen.issuer):
        assert re.match(r"https://[^/]|http://(127\.|localhost|\[::1\])", origin)
    again = {name: text_of(getattr(chosen, field.name)) for name, field in config.SETTINGS.items()}
    chosen_again = config.from_environ(again, None, os.devnull)
    assert all(
        getattr(chosen_again, field.name) == getattr(chosen, field.name)
        for field in config.SETTINGS.values()
    )


DOTENV_LINES = st.lists(
    st.builds(
        "{}{}{}".format,
        SETTING_NAMES,
        st.sampled_from(("=", " = ", "='", '="', ":")),
        st.text(max_size=12),
    ),
    max_size=5,
).map(lambda lines: "\n".join(lines).encode())


@example(b"XAI_PROXY_TOKEN_PATH='")
@given(DOTENV_LINES | st.binary())
def test_any_dotenv_is_a_config_or_an_error_that_names_its_variable_or_the_file(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ".env")
        path.write_bytes(content)
        _, complaints = settings({}, str(path))
    for error in complaints:
        name = re.match(r"'?(XAI_PROXY_\w*)", str(error))
        beginnings = (f"{path} cannot be read", f"{path} line ")
        assert name[1].encode() in content if name else str(error).startswith(beginnings)


@example({"XAI_PROXY_CLIENT_ID": "a${HOME}"})
@given(
    st.dictionaries(
        st.sampled_from(list(config.SETTINGS)),
        SETTING_TEXTS.filter(lambda text: "\r" not in text),
        max_size=4,
    )
)
def test_dotenv_sets_the_same_values_as_the_environment(environ):
    lines = [
        "{}='{}'".format(name, re.sub(r"(['\\])", r"\\\1", text)) for name, text in environ.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ".env")
        path.write_text("\n".join(lines), "utf-8")
        assert settings({}, str(path))[0] == settings(environ)[0]


# The issuer's responses


class ScriptedSession:
    """A session that returns this response of the issuer."""

    def __init__(self, answer: session.Answer):
        self._answer = answer

    def get(self, url, deadline=0.0):
        return self._answer

    def post(self, url, form, deadline=0.0):
        return self._answer


def answers(values: st.SearchStrategy) -> st.SearchStrategy:
    """Responses, mostly with such a value; and all that a network may put in their place."""
    pages = st.sampled_from(
        (
            b"<!DOCTYPE html><title>Just a moment...",
            b"error code: 1010",
            b"",
            b"\xef\xbb\xbf <html>",
        )
    )
    types = mostly(
        st.just("application/json; charset=utf-8"),
        st.sampled_from(("text/html", "text/plain")) | TEXT,
    )
    return st.builds(
        session.Answer,
        st.just(200) | st.sampled_from((201, 204, 302, 400, 401, 403, 415, 429, 503, 522)),
        st.fixed_dictionaries({}, optional={"Content-Type": types}),
        mostly(written(values), pages),
        st.none() | st.floats(0, 1e9),
    )


URLS = (
    st.builds(
        lambda parts, put, at: "".join(parts)[:at] + put + "".join(parts)[at:],
        st.tuples(
            st.sampled_from(
                (
                    "https://",
                    "https://",
                    "https://",
                    "http://",
                    "HTTPS://",
                    "//",
                    "ftp://",
                    "https:/",
                    "",
                )
            ),
            st.sampled_from(
                ("", "", "", "user@", "auth.x.ai@", "auth.x.ai\\@", "@", "evil.example/@", "a:b@")
            ),
            st.sampled_from(
                (
                    "auth.x.ai",
                    "x.ai",
                    "X.AI",
                    "a.b.x.ai",
                    "evil.example",
                    "evilx.ai",
                    "x.ai.evil.example",
                    "127.0.0.1",
                    "[::1]",
                    "localhost",
                    "login.example",
                    "x.ai%2eevil.example",
                )
            ),
            st.sampled_from(("", "", "", ":443", ":8443", ":", ":+443", ":0443", ":\uff14")),
            st.sampled_from(
                (
                    "",
                    "/oauth2/token",
                    "/",
                    "?@auth.x.ai",
                    "#@auth.x.ai",
                    "\\.x.ai/",
                    ".evil.example/",
                    ";@x.ai",
                )
            ),
        ),
        st.just("") | st.sampled_from("\\@#?/:;%.\t\n \0[]\uff0e\u3002") | TEXT,
        st.integers(0, 40),
    )
    | TEXT
)
ISSUERS = st.sampled_from((XAI, XAI, LOOPBACK, OTHER))
BEYOND_DOUBT = {
    XAI: r"https://([a-z0-9-]+\.)*x\.ai(:443)?(/[a-z0-9/]*)?",
    LOOPBACK: r"http://(127\.0\.0\.1|localhost)(/[a-z0-9/]*)?",
    OTHER: r"https://[a-z.]+(:443)?(/[a-z0-9/]*)?",
}


def check_target(issuer: str, url: str) -> None:
    """Fail if a request to `url` would go where a credential of `issuer` must not go."""
    # A slash to browsers.
    assert "\\" not in url
    target = urllib3.util.parse_url(requests.Request("POST", url).prepare().url)
    assert target.auth is None and target.fragment is None
    if issuer == XAI:
        assert re.search(r"(^|\.)x\.ai$", target.host) and (target.scheme, target.port or 443) == (
            "https",
            443,
        )
    elif target.scheme != "https":
        assert (
            issuer == LOOPBACK
            and target.scheme == "http"
            and target.host in ("127.0.0.1", "[::1]", "localhost")
        )


@example(LOOPBACK, "https://[::1].evil.example/")
@example(XAI, "https://evilx.ai/")
@example(XAI, "https://auth.x.ai/\\t")
@example(XAI, "https://auth.x.ai/t#x")
@given(ISSUERS, URLS)
def test_no_address_is_used_that_is_not_the_issuers(issuer, url):
    try:
        discovery.check_endpoint(issuer, url)
    except errors.IssuerUnavailable as error:
        check_message(error)
        assert not re.fullmatch(BEYOND_DOUBT[issuer], url)
    else:
        check_target(issuer, url)


METADATA = objects(
    issuer=ISSUERS | ISSUERS.map(lambda issuer: issuer + "/"),
    token_endpoint=URLS,
    authorization_endpoint=URLS,
    device_authorization_endpoint=URLS,
    revocation_endpoint=URLS,
)


@given(ISSUERS, answers(METADATA))
def test_any_discovery_response_gives_the_issuers_endpoints_or_none(issuer, answer):
    try:
        found = discovery.discover(ScriptedSession(answer), issuer)
    except errors.IssuerUnavailable as error:
        assert not error.sent
        check_message(error)
        return
    document = json.loads(answer.body)
    assert answer.status == 200 and document["issuer"].rstrip("/") == issuer == found.issuer
    for name, url in vars(found).items():
        assert url == document.get(name) or name == "issuer"
        if url is not None:
            check_target(issuer, url)


CODES = st.sampled_from(
    (
        *token_endpoint.DEAD_GRANT,
        "invalid_client",
        "access_denied",
        "temporarily_unavailable",
        SECRET,
    )
)
TOKEN_ANSWERS = answers(
    objects(
        access_token=TOKENS,
        refresh_token=PRINTABLE,
        id_token=objects(email=PRINTABLE).map(jwt),
        scope=PRINTABLE,
        expires_in=NUMBERS | st.integers(0).map(str) | st.just("9" * 400),
    )
    | objects(error=CODES, error_description=st.just(f"not {SECRET}") | TEXT, interval=NUMBERS)
)


def lasting(expires_in) -> session.Answer:
    return session.Answer(
        200, {}, json.dumps({"access_token": "a", "expires_in": expires_in}).encode()
    )


@example(lasting("9" * 400), None)
# The file does not accept such a time.
@example(lasting(10**11 - 1), None)
@given(TOKEN_ANSWERS, st.none() | LOGINS)
def test_any_token_response_gives_a_login_or_whether_the_token_was_spent(answer, former):
    form = {"grant_type": "refresh_token", "refresh_token": SECRET, "client_id": "client"}
    taken = 200 <= answer.status < 300
    try:
        login = token_endpoint.request(
            ScriptedSession(answer),
            XAI + "/token",
            form,
            issuer=XAI,
            former=former,
            now=lambda: NOW,
        )
    except errors.IssuerUnavailable as error:
        assert error.sent or not taken
        assert not error.sent or taken or answer.status >= 500
        check_message(error)
    except errors.OAuthError as error:
        assert type(error) in (errors.GrantRefused, errors.ClientRejected, errors.NotEntitled)
        assert answer.status < 500 and not answer.is_html and error.sent == taken
        if type(error) is errors.GrantRefused:
            assert (
                answer.status != 429
                and json.loads(answer.body)["error"] in token_endpoint.DEAD_GRANT
            )
            assert not error.certain or (
                json.loads(answer.body)["error"] == "invalid_grant" and answer.status in (400, 401)
            )
        check_message(error)
    else:
        body = json.loads(answer.body)
        assert taken and login.access_token == body["access_token"]
        new = body.get("refresh_token")
        assert login.refresh_token == (
            new if isinstance(new, str) and new else former and former.refresh_token
        )
        assert not body.get("error")
        assert token_json.from_json(token_json.to_json(login, None)) == login


DATES = st.datetimes(
    datetime.datetime(1970, 1, 1),
    datetime.datetime(2999, 1, 1),
    timezones=st.just(datetime.timezone.utc),
)
# RFC 9110 section 5.6.7.
DATE_FORMS = ("%a, %d %b %Y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")
DATE_WORDS = [
    "Mon",
    ",",
    "Jan",
    "1",
    "31",
    "99",
    "1994",
    "9999999999",
    ":",
    "00",
    "08:49:37",
    "GMT",
    "+0000",
    "-9999",
    "(",
    ")",
    '"',
    "\\",
]
DATE_TEXTS = st.lists(st.sampled_from(DATE_WORDS) | TEXT, max_size=8).map(" ".join)


@given(DATES, st.sampled_from(DATE_FORMS))
def test_a_date_is_read_in_both_its_forms(date, form):
    assert session.parse_date(date.strftime(form)) == math.floor(date.timestamp())


@given(DATE_TEXTS | TEXT)
def test_any_retry_after_is_seconds_or_none(text):
    seconds = session.parse_retry_after(text, NOW)
    assert seconds is None or 0 <= seconds < 1e12


# Headers

HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
SECRETS = {
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "cookie",
    "proxy-authorization",
    "cf-access-jwt-assertion",
    "x-auth-request-access-token",
    "x-amzn-oidc-data",
}
NOT_SENT = (
    HOP_BY_HOP
    | SECRETS
    | {
        "host",
        "user-agent",
        "content-length",
        "expect",
        "accept-encoding",
        "forwarded",
        "via",
        "cdn-loop",
        "x-real-ip",
        "true-client-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "fly-client-ip",
        "fastly-client-ip",
        "x-azure-clientip",
        "x-amzn-trace-id",
        "referer",
    }
)
NOT_PASSED = {
    "set-cookie",
    "alt-svc",
    "clear-site-data",
    "nel",
    "report-to",
    "reporting-endpoints",
    "strict-transport-security",
    "x-xai-proxy-error",
}
PREFIXES_NOT_SENT = (
    "proxy-",
    "x-forwarded-",
    "x-original-",
    "cf-",
    "x-envoy-",
    "x-amzn-oidc-",
    "x-auth-request-",
    "x-remote-",
    "remote-",
    "x-goog-iap-",
    "x-ms-client-principal",
    "tailscale-user-",
)


def in_any_case(name: str) -> st.SearchStrategy:
    return st.tuples(*[st.sampled_from((letter.lower(), letter.upper())) for letter in name]).map(
        "".join
    )


KNOWN_NAMES = (
    NOT_SENT
    | NOT_PASSED
    | {*(prefix + "x" for prefix in PREFIXES_NOT_SENT), "close", "x-one", "x-two", "accept"}
)
FIELD_NAMES = st.sampled_from(sorted(KNOWN_NAMES)).flatmap(in_any_case) | st.from_regex(
    message_head.NAME, fullmatch=True
).filter(lambda name: len(name) < 100)
LIST_ITEMS = FIELD_NAMES | st.sampled_from(
    ("gzip", "br;q=1", "deflate ; q=0", "close", " ", '"x-one"')
)
VALUE_CHARACTERS = st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=["Cc"])
FIELD_VALUES = (
    st.lists(LIST_ITEMS, max_size=3).map(", ".join) | st.text(VALUE_CHARACTERS, max_size=12)
).map(lambda value: value.strip(" \t"))
FIELDS = st.lists(
    st.tuples(FIELD_NAMES, FIELD_VALUES).map(
        lambda field: (field[0], SECRET) if field[0].lower() in SECRETS else field
    ),
    max_size=8,
)


def named_by_connection(fields) -> set[str]:
    values = ",".join(value for name, value in fields if name.lower() == "connection")
    return {option.strip(" \t").lower() for option in values.split(",")}


def sent(fields):
    return headers.to_upstream(fields, host="api.x.ai", user_agent="us", access_token="token")


@given(FIELDS)
def test_upstream_gets_every_request_header_except_hop_by_hop_and_secret_ones(fields):
    ours, rest = sent(fields)[:3], sent(fields)[3:]
    assert ours == [("Host", "api.x.ai"), ("User-Agent", "us"), ("Authorization", "Bearer token")]
    dropped = NOT_SENT | named_by_connection(fields)
    codings = [value for name, value in rest if name.lower() == "accept-encoding"]
    assert [field for field in rest if field[0].lower() != "accept-encoding"] == [
        field
        for field in fields
        if field[0].lower() not in dropped and not field[0].lower().startswith(PREFIXES_NOT_SENT)
    ]
    assert len(codings) <= 1 and SECRET not in repr(rest)
    assert all(
        re.match("gzip|deflate|identity", coding, re.I)
        for value in codings
        for coding in value.split(", ")
    )
    assert sent(rest) == ours + rest


@example([("Connection", "close"), ("Close", "x")], None)
@example([("Connection", "content-length")], "5")
@given(FIELDS, st.none() | st.from_regex("[0-9]{1,18}", fullmatch=True))
def test_the_client_gets_every_response_header_except_hop_by_hop_ones(fields, length):
    fields = [
        field for field in fields if field[0].lower() not in ("content-length", "transfer-encoding")
    ]
    if length is not None:
        fields.insert(len(fields) // 2, ("Content-Length", length))
    lines = passed(fields)
    dropped = HOP_BY_HOP | NOT_PASSED | named_by_connection(fields) - {"content-length", "close"}
    lengths = [line for line in lines if line.lower().startswith("content-length:")]
    assert [line for line in lines if line not in lengths] == [
        f"{name}: {value}"
        for name, value in fields
        if name.lower() not in dropped | {"content-length"}
    ]
    assert lengths == ([] if length is None else [f"Content-Length: {int(length)}"])
    assert passed([line.split(": ", 1) for line in lines]) == lines


def passed(fields) -> list[str]:
    """The header lines of a response with these that the client gets."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    head = response_head.parse(f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode("latin-1"), "GET")
    return headers.to_client(
        head.lines, head.values, length=head.length, origin="https://api.x.ai"
    ).split("\r\n")[1:]


# Streams

BOM = b"\xef\xbb\xbf"
STREAM_PARTS = st.lists(
    st.sampled_from(
        (
            b"",
            b"",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            b"data: x",
            b"data: x\n\n",
            b":",
            b"x",
            b"id: 1\n",
            b": keepalive\n\n",
            BOM,
            BOM[:1],
            BOM[1:],
        )
    )
    | st.binary(max_size=3),
    max_size=12,
)


def events(stream: bytes) -> list[list[bytes]]:
    """The events that a client parses from a stream: lines of fields, without comments (WHATWG HTML
    section 9.2.6).
    """
    found, event = [], []
    for line in re.split(rb"\r\n|\n|\r", stream.removeprefix(BOM))[:-1]:
        if line and not line.startswith(b":"):
            event.append(line)
        elif not line and event:
            found.append(event)
            event = []
    return found


@example([b"", BOM, b""])
@example([b"", BOM, BOM])
@example([b"", BOM[:1], BOM[1:], b"data: x\n\n"])
@example([b"", BOM[:1], b""])
@given(STREAM_PARTS)
def test_comments_come_in_every_silence_after_a_line_and_change_no_event(parts):
    latest = [b"x"]

    def fed():
        for part in parts:
            latest[0] = part
            yield part
        latest[0] = b"the end"

    out, comments = [], []
    for part in event_stream.with_comments(fed()):
        out.append(part)
        comments.append(not latest[0])
    silences = []
    for number, part in enumerate(parts):
        if not part:
            begun = b"".join(parts[:number])
            # A mark after a comment is awaited and removed.
            if not parts[0]:
                begun = b"" if BOM.startswith(begun) else begun.removeprefix(BOM)
            silences.append(not begun or begun.endswith((b"\r", b"\n")))
    assert sum(comments) == sum(silences) and all(out)
    plain = b"".join(part for part, is_comment in zip(out, comments) if not is_comment)
    assert plain == b"".join(parts) or (plain == b"".join(parts).removeprefix(BOM) and comments[0])
    assert events(b"".join(out)) == events(b"".join(parts))


CHUNK_PARTS = st.lists(
    st.sampled_from(
        (
            b"5\r\nhello\r\n",
            b"5\r\n",
            b"hello",
            b"\r\n",
            b"0\r\n\r\n",
            b"0\r\n",
            b"1;a=b\r\nx\r\n",
            b"X: y\r\n",
            b"fffffffffffffff\r\n",
            b"\n",
            b"\r",
            b";",
            b"00",
            b"a",
        )
    )
    | st.binary(max_size=5),
    max_size=10,
)
KINDS = st.sampled_from(
    (framing.Chunked, framing.Chunked, framing.UntilClose, lambda: framing.Sized(7))
)


def body_of(kind, pieces: list[bytes]) -> tuple[bytes, bytes, bool] | str:
    """The content, what follows it, and whether it has ended; or what is wrong with it."""
    body, content, pieces = kind(), b"", list(pieces)
    while pieces and not body.ended:
        data = pieces.pop(0)
        try:
            content += b"".join(framing.content_of(body, data))
        except message_head.Malformed as error:
            return str(error)
        assert body.ended or body.used == len(data)
        if body.ended:
            pieces.insert(0, data[body.used :])
    return content, b"".join(pieces), body.ended


@example(framing.Chunked, [b"5\r\nhelloXY", b"0\r\n\r\n"])
@given(KINDS, CHUNK_PARTS)
def test_a_body_is_the_same_with_any_split_of_its_bytes(kind, parts):
    data = b"".join(parts)
    whole = body_of(kind, [data])
    assert (
        body_of(kind, parts)
        == whole
        == body_of(kind, [data[at : at + 1] for at in range(len(data))])
    )
