"""Which header fields pass: hop-by-hop fields are dropped, the others pass unchanged."""

import pytest

from xaiproxy.http1 import headers, response_head

OURS = [("Host", "api.x.ai"), ("User-Agent", "xaiproxy/1"), ("Authorization", "Bearer the-token")]
HOP_BY_HOP = [
    "Connection",
    "Keep-Alive",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
]

# Fields that tunnels, load balancers and caches in front of the proxy add.
WAY_TO_US = [
    "CF-Connecting-IP",
    "CF-Connecting-IPv6",
    "CF-Ray",
    "CF-Visitor",
    "CF-IPCountry",
    "CF-Worker",
    "Cf-Warp-Tag-Id",
    "CDN-Loop",
    "Via",
    "X-Real-IP",
    "True-Client-IP",
    "X-Client-IP",
    "X-Cluster-Client-IP",
    "Fly-Client-IP",
    "Fastly-Client-IP",
    "X-Azure-ClientIP",
    "X-Envoy-External-Address",
    "X-Envoy-Expected-Rq-Timeout-Ms",
    "X-Amzn-Trace-Id",
    "X-Original-URL",
    "X-Original-Forwarded-For",
    "X-Original-Host",
    "Referer",
]
# Credentials of reverse proxies, and the identities that these have authenticated.
CREDENTIALS = [
    "Api-Key",
    "X-Goog-Api-Key",
    "Cf-Access-Jwt-Assertion",
    "Cf-Access-Client-Id",
    "Cf-Access-Client-Secret",
    "Cf-Access-Authenticated-User-Email",
    "X-Auth-Request-Access-Token",
    "X-Auth-Request-User",
    "X-Auth-Request-Email",
    "X-Amzn-Oidc-Data",
    "X-Amzn-Oidc-Accesstoken",
    "X-Amzn-Oidc-Identity",
    "X-Remote-User",
    "X-Remote-Group",
    "Remote-User",
    "Remote-Groups",
    "X-Goog-Iap-Jwt-Assertion",
    "X-MS-Client-Principal",
    "X-MS-Client-Principal-Name",
    "Tailscale-User-Login",
    "Tailscale-User-Name",
]
REQUESTS_OWN = [
    "X-Grok-Conv-Id",
    "X-Grok-Req-Id",
    "X-Grok-Session-Id",
    "X-Idempotency-Key",
    "Idempotency-Key",
    "Traceparent",
    "Tracestate",
    "Baggage",
    "X-Request-Id",
    "Session-Id",
    "Session_Id",
    "Conversation_Id",
    "X-Session-Affinity",
    "X-Claude-Code-Session-Id",
    "Anthropic-Version",
    "Anthropic-Beta",
    "OpenAI-Beta",
    "OpenAI-Organization",
    "X-Stainless-Lang",
    "X-Stainless-Retry-Count",
    "Accept",
    "Accept-Language",
    "Content-Type",
    "Content-Encoding",
    "Origin",
    "Sec-Fetch-Site",
    "Sec-WebSocket-Key",
    "HTTP-Referer",
    "X-Title",
    "Priority",
    "X-App",
    "Range",
]
PSEUDONYM = "xaiproxy-0123456789abcdef"


def to_upstream(*fields, pseudonym=""):
    """Return the fields that are sent, without the proxy's own three, which come first."""
    sent = headers.to_upstream(
        list(fields),
        host="api.x.ai",
        user_agent="xaiproxy/1",
        access_token="the-token",
        pseudonym=pseudonym,
    )
    assert sent[:3] == OURS
    assert not {name.lower() for name, _ in sent[3:]} & {"host", "user-agent", "authorization"}
    return sent[3:]


def accept_encoding(*values) -> str:
    """Return the one Accept-Encoding that is sent for these."""
    sent = to_upstream(*(("accept-Encoding", value) for value in values))
    assert [name for name, _ in sent] == ["Accept-Encoding"]
    return sent[0][1]


def spellings(name):
    return name, name.lower(), name.upper(), name.swapcase()


# to upstream


def test_order_case_and_repetitions_are_preserved_to_upstream():
    fields = [
        ("x-B", "2"),
        ("Content-Type", 'application/json; charset="é"'),
        ("x-a", "1"),
        ("X-b", ""),
        ("x-B", "2"),
        ("Accept", "text/event-stream"),
        ("Range", "bytes=0-"),
        ("If-None-Match", "*"),
        ("Origin", "http://a"),
        ("Idempotency-Key", "k"),
        ("Content-Encoding", "gzip"),
        ("X-Grok-Conv-Id", "c"),
    ]
    assert to_upstream(*fields) == [*fields]


@pytest.mark.parametrize(
    "name",
    [
        *HOP_BY_HOP,
        "Authorization",
        "X-Api-Key",
        "Cookie",
        "Host",
        "User-Agent",
        "Content-Length",
        "Expect",
        "Proxy-Authorization",
        "Proxy-Authenticate",
        "Proxy-",
        "Proxy-X",
        "Forwarded",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-",
        "X-Forwarded-Client-Cert",
        *WAY_TO_US,
        *CREDENTIALS,
    ],
)
def test_hop_by_hop_proxy_set_and_secret_fields_are_dropped(name):
    for spelling in spellings(name):
        assert to_upstream((spelling, "x"), ("X-One", "1"), (spelling, "y")) == [("X-One", "1")]


@pytest.mark.parametrize("name", REQUESTS_OWN)
def test_end_to_end_request_fields_pass(name):
    for spelling in spellings(name):
        assert to_upstream((spelling, "x"), pseudonym=PSEUDONYM)[:-1] == [(spelling, "x")]


@pytest.mark.parametrize(
    "name",
    [
        "X-Authorization",
        "Authorization-X",
        "Cookie2",
        "Proxy",
        "X-Proxy-A",
        "X-Forwarded",
        "Forwarded-For",
        "X-Host",
        "X-Api-Key-Id",
        "Te-X",
        "Set-Cookie",
        "Connection-X",
        "CF",
        "Remote",
        "X-Original",
        "Api-Key-Id",
        "X-Via",
        "X-Amzn-Request-Id",
        "X-Real-IP-2",
        "X-Azure",
        "X-Goog-Api-Client",
        "X-CF-Ray",
        "Referer-Policy",
        "X-Referer",
    ],
)
def test_fields_with_similar_names_pass(name):
    assert to_upstream((name, "x")) == [(name, "x")]


@pytest.mark.parametrize(
    "value",
    ["x-one", "X-ONE", " x-one ", "close, x-One", "x-one,close", ",,\tx-one ,", '"x-one", x-one'],
)
def test_fields_that_connection_names_are_dropped(value):
    sent = to_upstream(("X-One", "1"), ("Connection", value), ("x-one", "2"), ("X-Two", "3"))
    assert sent == [("X-Two", "3")]


def test_every_connection_field_counts():
    sent = to_upstream(("connection", "a"), ("A", "1"), ("B", "2"), ("CONNECTION", "b"), ("C", "3"))
    assert sent == [("C", "3")]


def test_connection_cannot_drop_the_fields_that_the_proxy_sets():
    named = "authorization, host, user-agent, content-length, connection"
    assert to_upstream(("Connection", named)) == []


def test_connection_can_drop_the_fields_that_the_client_sent():
    named = "content-type, accept-encoding"
    sent = to_upstream(("Connection", named), ("Content-Type", "a"), ("Accept-Encoding", "gzip"))
    assert sent == []


@pytest.mark.parametrize(
    "value, reduced",
    [
        ("gzip, deflate, br, zstd", "gzip, deflate"),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("identity", "identity"),
        ("GZip", "GZip"),
        ("br", "identity"),
        ("br, zstd", "identity"),
        ("*", "identity"),
        ("", "identity"),
        (" , ,", "identity"),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", "gzip;q=0.8"),
        ("gzip;q=0", "gzip;q=0"),
        ("gzip;q=0, *;q=0", "gzip;q=0"),
        ("identity;q=0, br", "identity;q=0"),
        ("gzip ; q=0.5,deflate; q=0.4", "gzip ; q=0.5, deflate; q=0.4"),
        ("br,gzip,zstd,deflate,compress,x-gzip,identity", "gzip, deflate, identity"),
        ("xgzip, gzipx, gzip-x", "identity"),
        ("gzip br", "identity"),
    ],
)
def test_accept_encoding_is_reduced_to_codings_that_the_proxy_decodes(value, reduced):
    assert accept_encoding(value) == reduced


def test_several_accept_encoding_fields_become_one():
    assert accept_encoding("br", "gzip;q=0.5", "deflate") == "gzip;q=0.5, deflate"


def test_no_accept_encoding_is_added():
    assert to_upstream() == []


@pytest.mark.parametrize(
    "values, sent",
    [
        ([], "1.1 " + PSEUDONYM),
        (["1.1 nginx", "HTTP/2 edge (x)"], "1.1 " + PSEUDONYM),
        ([""], "1.1 " + PSEUDONYM),
        (["1.1 xaiproxy-aaaaaaaaaaaaaaaa"], "1.1 xaiproxy-aaaaaaaaaaaaaaaa, 1.1 " + PSEUDONYM),
        (
            ["1.0 fred,1.1 xaiproxy-aaaaaaaaaaaaaaaa , 2 x", "1.1 xaiproxy-0000000000000001"],
            "1.1 xaiproxy-aaaaaaaaaaaaaaaa, 1.1 xaiproxy-0000000000000001, 1.1 " + PSEUDONYM,
        ),
        (
            [
                "1.1 xaiproxy-aaaaaaaaaaaaaaa",
                "1.1 xaiproxy-AAAAAAAAAAAAAAAA",
                "1.1 xaiproxy-aaaaaaaaaaaaaaaaa",
                "1.1 my.xaiproxy-aaaaaaaaaaaaaaaa",
                "1.1 xaiproxy-aaaaaaaaaaaaaaaa (10.1.2.3)",
            ],
            "1.1 " + PSEUDONYM,
        ),
    ],
)
def test_via_keeps_only_the_entries_of_xaiproxy(values, sent):
    fields = [("X-One", "1"), *(("vIA", value) for value in values), ("X-Two", "2")]
    assert to_upstream(*fields, pseudonym=PSEUDONYM) == [
        ("X-One", "1"),
        ("X-Two", "2"),
        ("Via", sent),
    ]
    assert to_upstream(*fields) == [("X-One", "1"), ("X-Two", "2")]


def test_the_given_fields_are_not_modified():
    fields = [("Connection", "x"), ("X", "1"), ("Accept-Encoding", "br")]
    before = list(fields)
    to_upstream(*fields)
    assert fields == before


# to the client


def to_client(*lines, length=None, status="200 OK", origin="https://api.x.ai"):
    """Return the lines that the head's parser and the header rules make of these."""
    data = "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""])
    head = response_head.parse(data.encode("latin-1"), "GET")
    first, *passed = headers.to_client(head.lines, head.values, length=length, origin=origin).split(
        "\r\n"
    )
    assert first == ""
    return passed


def test_order_case_and_repetitions_are_preserved_to_the_client():
    lines = [
        "x-B: 2",
        "Content-Type:text/plain",
        "x-a: é\xff",
        "X-b:",
        "x-B: 2",
        "Content-Encoding: gzip",
        "date: Mon, 01 Jan 2024 00:00:00 GMT",
        "Server: cloudflare",
        "WWW-Authenticate: Bearer",
        "Vary: a",
        "vary: b",
        "Retry-After: 5",
        'ETag: W/"a"',
        "x-should-retry: true",
        "Access-Control-Allow-Origin: *",
        "User-Agent: x",
        "tab: a\tb ",
    ]
    assert to_client(*lines) == lines


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in HOP_BY_HOP if name != "Transfer-Encoding"),
        "Set-Cookie",
        "Alt-Svc",
        "Strict-Transport-Security",
        "Clear-Site-Data",
        "NEL",
        "Report-To",
        "Reporting-Endpoints",
        "X-XAI-Proxy-Error",
    ],
)
def test_hop_by_hop_fields_and_policies_of_the_origin_are_dropped(name):
    for spelling in spellings(name):
        assert to_client(f"{spelling}: x", "X-One: 1", f"{spelling}: y") == ["X-One: 1"]


@pytest.mark.parametrize(
    "value", ["x-one", "close, X-ONE", " x-one\t, ", "keep-alive,,x-One", "(, x-one, )"]
)
def test_response_fields_that_connection_names_are_dropped(value):
    assert to_client(
        "X-One: 1", f"Connection: {value}", "X-Two: 2", "x-one: 3", "x-one-more: 4"
    ) == ["X-Two: 2", "x-one-more: 4"]
    assert to_client("X-One: 1", "Connection: x-two", f"Connection: {value}", "X-Two: 2") == []


def test_connection_cannot_drop_the_content_length():
    assert to_client("Connection: content-length, x", "X: y", "Content-Length: 5", length=5) == [
        "Content-Length: 5"
    ]


def test_the_content_length_is_the_parsed_one():
    for spelling in spellings("Content-Length"):
        lines = ["A: 1", f"{spelling}: 5", "B: 2"]
        assert to_client(*lines, length=5) == lines
    assert to_client("Content-Length: 05", length=5) == ["Content-Length: 5"]
    assert to_client("Content-Length: 0", length=0) == ["Content-Length: 0"]


def test_a_repeated_content_length_is_sent_once():
    assert to_client("Content-Length: 5", "A: 1", "content-length: 5", length=5) == [
        "A: 1",
        "Content-Length: 5",
    ]


def test_an_unreliable_content_length_is_dropped():
    assert to_client("Transfer-Encoding: chunked", "Content-Length: 5", length=None) == []
    assert to_client("Content-Length: 5", length=None) == []


def test_no_content_length_is_added():
    assert to_client("A: 1", length=5) == ["A: 1"]


def test_only_a_426_keeps_its_upgrade_fields():
    lines = [
        "Connection: upgrade, x-one",
        "X-One: 1",
        "uPgrade: websocket",
        "X-Two: 2",
        "Upgrade: TLS/1.3",
    ]
    assert to_client(*lines, status="426 Upgrade Required") == [
        "uPgrade: websocket",
        "X-Two: 2",
        "Upgrade: TLS/1.3",
    ]
    for status in ("200 OK", "101 x", "400 x", "503 x"):
        assert to_client(*lines, status=status) == ["X-Two: 2"]


# Location


@pytest.mark.parametrize(
    "origin, reference",
    [
        ("https://api.x.ai", "https://api.x.ai"),
        ("https://api.x.ai", "HTTPS://API.x.ai"),
        ("https://api.x.ai", "https://api.x.ai:443"),
        ("https://api.x.ai:443", "https://api.x.ai"),
        ("https://api.x.ai", "//api.x.ai"),
        ("https://api.x.ai", "https://api.x.ai:"),
        ("http://127.0.0.1:81", "http://127.0.0.1:81"),
        ("http://127.0.0.1", "http://127.0.0.1:80"),
        ("http://[::1]:81", "http://[::1]:81"),
    ],
)
def test_a_location_at_upstream_becomes_a_path_of_the_proxy(origin, reference):
    for name in ("Location", "content-LOCATION", "location"):
        for path in ("/v1/x", "/v2/files/a%2Fb?c=d#e", "/v1/"):
            lines = ["A: 1", f"{name}: {reference}{path}", "B: 2"]
            assert to_client(*lines, status="302 x", origin=origin) == [
                "A: 1",
                f"{name}: {path}",
                "B: 2",
            ]


@pytest.mark.parametrize(
    "reference",
    [
        "/v1/x",
        "x",
        "",
        "?a=b",
        "https://api.x.ai/",
        "https://api.x.ai",
        "https://api.x.ai/v1",
        "https://api.x.ai/v3/x",
        "https://api.x.ai/oauth/v1/x",
        "https://api.x.ai?/v1/x",
        "https://api.x.ai#/v1/x",
        "http://api.x.ai/v1/x",
        "https://api.x.ai:8443/v1/x",
        "https://api.x.ai:80/v1/x",
        "https://user@api.x.ai/v1/x",
        "https://api.x.ai\\@evil.example/v1/x",
        "https://api.x.ai.evil.example/v1/x",
        "https://evil.example/v1/x",
        "https://evil.example/https://api.x.ai/v1/x",
        "https://x.ai/v1/x",
        "https:///v1/x",
        "///v1/x",
        "https:/v1/x",
        "https:api.x.ai/v1/x",
        "ftp://api.x.ai/v1/x",
        "x https://api.x.ai/v1/x",
        "https://api.x.ai %2f/v1/x",
    ],
)
def test_any_other_location_passes_unchanged(reference):
    lines = [f"Location: {reference}", f"Content-Location: {reference}", f"X-Location: {reference}"]
    assert to_client(*lines, status="302 x") == lines


def test_other_fields_that_name_upstream_pass_unchanged():
    lines = [
        "Link: <https://api.x.ai/v1/x>; rel=next",
        "X-Location: https://api.x.ai/v1/x",
        "Location: /v1/y",
    ]
    assert to_client(*lines) == lines


# X-Accel-Buffering


@pytest.mark.parametrize(
    "value",
    [
        "text/event-stream",
        "Text/Event-Stream",
        "text/event-stream; charset=utf-8",
        "text/event-stream ;x",
    ],
)
def test_an_event_stream_gets_x_accel_buffering_no(value):
    lines = [f"content-type: {value}", "A: 1"]
    assert to_client(*lines) == [*lines, "X-Accel-Buffering: no"]
    for given in ("yes", "no", ""):
        lines = [f"Content-Type: {value}", f"x-accel-buffering: {given}"]
        assert to_client(*lines) == lines


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "application/json",
        "text/event-streams",
        "text/event",
        "",
        "text/plain; text/event-stream",
    ],
)
def test_other_responses_get_no_x_accel_buffering(value):
    assert to_client(f"Content-Type: {value}") == [f"Content-Type: {value}"]
