"""Authorization of callers: a key, or a request that no web page can forge."""

import re

import pytest

from xaiproxy import client_keys, config, errors
from xaiproxy.http1 import request_head
from xaiproxy.proxy.access import Access

KEYS = {"laptop": "xaip_of-the-laptop", "phone": "xaip_of-the-phone"}
KEY = KEYS["laptop"]
LISTED = "https://chat.example"


def head(
    *lines: str,
    method: str = "GET",
    target: str = "/v1/models",
    host: str | None = "localhost:9090",
):
    lines = [*lines] if host is None else [f"Host: {host}", *lines]
    version = "HTTP/1.0" if host is None else "HTTP/1.1"
    text = "\r\n".join([f"{method} {target} {version}", *lines, "", ""])
    return request_head.parse(text.encode("latin-1"))


def settings(**values: str) -> config.Config:
    return config.from_environ(
        {f"XAI_PROXY_{name}": value for name, value in values.items()} | {"HOME": "/"},
        dotenv_path="/dev/null",
    )


class Gate:
    """Access with the keys of KEYS, or without keys."""

    def __init__(self, folder, with_keys: bool, **values: str):
        self.path = folder / ("keys" if with_keys else "no-keys")
        if with_keys:
            self.path.write_text(
                "".join(f"{name} {client_keys.digest(key)}\n" for name, key in KEYS.items())
            )
        self.access = Access(settings(**values), client_keys.ClientKeys(self.path))

    def __call__(self, *lines: str, key_needed: bool = True, **how) -> str | None:
        """Return the key's name, or the error code of the refusal."""
        try:
            return self.access.check(head(*lines, **how), key_needed=key_needed)
        except errors.ErrorResponse as refusal:
            return refusal.code

    def preflight(self, *lines: str, **how) -> dict[str, str] | str | None:
        try:
            fields = self.access.preflight(head(*lines, **{"method": "OPTIONS", **how}))
        except errors.ErrorResponse as refusal:
            return refusal.code
        if fields is not None:
            assert len(dict(fields)) == len(fields)
        return fields if fields is None else dict(fields)


@pytest.fixture
def anonymous(tmp_path) -> Gate:
    """Without keys, but with one more Host name and one Origin."""
    return Gate(
        tmp_path, False, ALLOWED_HOSTS="proxy.example, Sidecar.Local.", ALLOWED_ORIGINS=LISTED
    )


@pytest.fixture
def keyed(tmp_path) -> Gate:
    return Gate(tmp_path, True, ALLOWED_HOSTS="proxy.example", ALLOWED_ORIGINS=LISTED)


def test_without_keys_any_caller_but_a_web_page_is_served(anonymous):
    assert anonymous() is None
    # Many clients always send a key.
    assert anonymous("Authorization: Bearer sk-anything") is None
    assert anonymous("X-Api-Key: x", "User-Agent: curl/8") is None


# Host

OUR_HOSTS = [
    "localhost",
    "LOCALHOST",
    "LocalHost:9090",
    "localhost.",
    "localhost.:80",
    "a.localhost",
    "localhost:",
    "[::1]:",
    "xai-proxy:",
    "A.B.LocalHost:1",
    "evil.localhost",
    "127.0.0.1",
    "127.0.0.1:9090",
    "127.0.0.1.",
    "127.1.2.3",
    "10.1.2.3:65535",
    "8.8.8.8",
    "[::1]",
    "[::1]:9090",
    "[FE80::1]",
    # An attacker's DNS cannot resolve a name without a dot.
    "xai-proxy",
    "xai-proxy:9090",
    "XAI-PROXY.",
    "my_box",
    "2130706433",
    "0x7f000001",
    "host.docker.internal",
    "Host.Docker.Internal:9090",
    "host.containers.internal.",
    "proxy.example",
    "PROXY.example.:443",
    "sidecar.local",
]
STRANGE_HOSTS = [
    "evil.example",
    "evil.example:9090",
    "localhost.evil.example",
    "localhost.evil.example.",
    "127.0.0.1.evil.example",
    "evillocalhost.com",
    "a.evillocalhost",
    "localhost.com",
    "a.localhost.b",
    "localhost..",
    "127.0.0.1.nip.io",
    "host.docker.internal.evil.example",
    "evil.host.docker.internal",
    "a.proxy.example",
    "proxy.example.evil.example",
    "xproxy.example",
    "docker.internal",
    "0x7f.1",
    "127.1",
    "127.0.0.01",
    "0177.0.0.1",
    "127.0.0.1.1",
    "256.1.1.1",
    "1.2.3",
    "xn--80ak6aa92e.com",
    "sidecar.local.net",
    # other spellings of loopback
    "0.0.0.0",
    "0.0.0.0:9090",
    "0.0.0.0.",
    "[::]",
    "[0:0::0]:9090",
    "[::ffff:127.0.0.1]:1",
    "[::FFFF:7f00:1]",
    "[::ffff:0:0]",
]
NO_HOSTS = [
    "",
    ".",
    "..",
    ".localhost",
    "-a",
    ":9090",
    ":",
    "localhost::",
    "localhost:x",
    "localhost:123456",
    "localhost:80:80",
    "local host",
    "localhost,evil.example",
    "localhost, localhost",
    "localhost/evil.example",
    "evil.example/localhost",
    "localhost@evil.example",
    "user@localhost",
    "localhost#",
    "localhost?",
    "localhost\\evil",
    "http://localhost",
    "l%6fcalhost",
    "localhost%00.evil.example",
    "::1",
    "[::1",
    "::1]",
    "[]",
    "[localhost]",
    "[::1]evil.example",
    "[::1].evil.example",
    "[::1%25lo]",
    "[fe80::1%lo]",
    "lo\xadcalhost",
    "loc\xe4lhost",
    "*",
    "*.localhost",
    "'localhost'",
    "[::1]:x",
]


@pytest.mark.parametrize("host", OUR_HOSTS)
def test_hosts_that_dns_rebinding_cannot_use_are_accepted(anonymous, keyed, host):
    assert anonymous(host=host) is None
    assert keyed(f"Authorization: Bearer {KEY}", host=host) == "laptop"


@pytest.mark.parametrize("host", STRANGE_HOSTS)
def test_hosts_that_dns_rebinding_could_use_are_refused(anonymous, keyed, host):
    assert anonymous(host=host) == "host_not_allowed"
    assert anonymous(host=host, key_needed=False) == "host_not_allowed"
    assert keyed("Authorization: Bearer wrong", host=host) == "host_not_allowed"


@pytest.mark.parametrize("host", NO_HOSTS)
def test_a_malformed_host_is_refused(anonymous, keyed, host):
    assert anonymous(host=host) == "host_not_allowed"
    assert keyed(host=host) == "host_not_allowed"


def test_a_request_without_host_is_refused(anonymous):
    assert anonymous(host=None) == "host_not_allowed"


def test_a_valid_key_is_accepted_under_every_host(keyed):
    for host in (*STRANGE_HOSTS, "", None):
        assert keyed(f"Authorization: Bearer {KEY}", host=host) == "laptop"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "Team.Example.Org:9090", "a.b.example.", "1.2.3", "0.0.0.0", "[::]:9090"],
)
def test_the_403_names_the_setting_and_its_value_for_a_host(tmp_path, host):
    gate = Gate(tmp_path, False)
    with pytest.raises(errors.HostNotAllowed) as caught:
        gate.access.check(head(host=host), key_needed=True)
    value, name = re.search(r"add (\S+) to XAI_PROXY_(\w+)", str(caught.value)).groups()
    assert caught.value.status == 403 and host in str(caught.value)
    assert Gate(tmp_path, False, **{name: value})(host=host) is None


def test_a_long_host_is_shortened_in_the_403(anonymous):
    with pytest.raises(errors.HostNotAllowed) as caught:
        anonymous.access.check(head(host="a." * 10000), key_needed=True)
    assert len(str(caught.value)) < 500


# Sec-Fetch-Site and Origin


@pytest.mark.parametrize(
    "site, taken",
    [
        ("same-origin", True),
        ("none", True),
        ("cross-site", False),
        ("same-site", False),
        ("", False),
        ("nonsense", False),
        ("same-origin, cross-site", False),
    ],
)
def test_sec_fetch_site_must_be_same_origin_or_none(anonymous, site, taken):
    expected = None if taken else "origin_not_allowed"
    assert anonymous(f"Sec-Fetch-Site: {site}") == expected
    assert anonymous(f"sec-fetch-site: {site}", "Sec-Fetch-Site: none") == expected
    assert anonymous(f"Sec-Fetch-Site: {site}", key_needed=False) == expected


@pytest.mark.parametrize(
    "host, origin",
    [
        ("localhost:9090", "http://localhost:9090"),
        ("LOCALHOST:9090", "http://localhost:9090"),
        ("localhost", "http://localhost"),
        ("localhost:9090", "HTTP://LocalHost:9090"),
        ("[::1]:9090", "http://[::1]:9090"),
        ("127.0.0.1:9090", "http://127.0.0.1:9090"),
        # A reverse proxy in front terminates TLS.
        ("xai-proxy", "https://xai-proxy"),
        ("localhost:", "http://localhost"),
        ("localhost:9090", LISTED),
        ("localhost:9090", LISTED.upper()),
        ("proxy.example", LISTED),
    ],
)
def test_the_proxys_own_and_listed_origins_are_accepted(anonymous, host, origin):
    assert anonymous(f"Origin: {origin}", host=host) is None
    assert anonymous(f"Origin: {origin}", "Sec-Fetch-Site: same-origin", host=host) is None


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "NULL",
        "",
        "*",
        "localhost:9090",
        "http://localhost",
        "http://localhost:9091",
        "http://127.0.0.1:9090",
        "http://a.localhost:9090",
        "http://localhost:9090.evil.example",
        "http://localhost:9090/",
        "http://localhost:9090 http://evil.example",
        "http://localhost:9090, http://evil.example",
        "ws://localhost:9090",
        "ftp://localhost:9090",
        "http://user@localhost:9090",
        "https://chat.example.",
        "https://chat.example:443",
        "http://chat.example",
        "https://chat.example/",
        "https://chat.example.evil",
        "https://xchat.example",
        "https://a.chat.example",
        "chat.example",
        "chrome-extension://abcdefgh",
        "file://",
        "http://evil.example:9090",
    ],
)
def test_any_other_origin_is_refused(anonymous, keyed, origin):
    assert anonymous(f"Origin: {origin}") == "origin_not_allowed"
    assert anonymous(f"Origin: {origin}", "Sec-Fetch-Site: same-origin") == "origin_not_allowed"
    assert anonymous(f"Origin: {origin}", key_needed=False) == "origin_not_allowed"
    assert keyed(f"Origin: {origin}", "X-Api-Key: wrong") == "origin_not_allowed"
    # A key is enough.
    assert keyed(f"Origin: {origin}", f"X-Api-Key: {KEY}") == "laptop"


BROWSER = "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"


@pytest.mark.parametrize(
    "host",
    [
        "xai-proxy",
        "box:9090",
        "10.1.2.3",
        "[fe80::1]:9090",
        "host.docker.internal",
        "localhost.",
        "proxy.example",
        "127box",
        "localhost-1",
        "2130706433",
    ],
)
def test_a_browsers_get_without_origin_or_fetch_metadata_is_refused(anonymous, keyed, host):
    for method in ("GET", "HEAD"):
        assert anonymous(BROWSER, host=host, method=method) == "origin_not_allowed"
        assert (
            anonymous(BROWSER, host=host, method=method, key_needed=False) == "origin_not_allowed"
        )
    assert keyed(BROWSER, f"X-Api-Key: {KEY}", host=host) == "laptop"
    # Requests with fetch metadata or an Origin are accepted, and so are other methods and clients.
    # PowerShell sends such a User-Agent.
    assert anonymous(BROWSER, host=host, method="POST") is None
    assert anonymous(BROWSER, "Sec-Fetch-Site: none", host=host) is None
    assert anonymous(BROWSER, f"Origin: http://{host}", host=host) is None
    assert anonymous(BROWSER, f"Origin: {LISTED}", host=host) is None
    for agent in ("curl/8", "OpenAI/JS 4.1", "compatible; Mozilla/5.0", ""):
        assert anonymous(f"User-Agent: {agent}", host=host) is None
    assert anonymous("User-Agent: a", BROWSER, host=host) == "origin_not_allowed"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:",
        "LocalHost:9090",
        "a.b.localhost",
        "127.0.0.1:9090",
        "127.1.2.3",
        "[::1]:9090",
    ],
)
def test_a_browsers_get_without_fetch_metadata_is_accepted_on_loopback(anonymous, host):
    # PowerShell sends such a User-Agent.
    assert anonymous(BROWSER, host=host) is None


def test_a_cross_site_request_of_a_listed_origin_is_accepted(anonymous):
    assert anonymous(f"Origin: {LISTED}", "Sec-Fetch-Site: cross-site") is None
    # A request without an Origin could come from any page.
    assert anonymous(f"Referer: {LISTED}/", "Sec-Fetch-Site: cross-site") == "origin_not_allowed"


def test_two_origins_are_refused(anonymous):
    for first, second in (
        (LISTED, LISTED),
        (LISTED, "http://evil.example"),
        ("http://localhost:9090",) * 2,
    ):
        assert anonymous(f"Origin: {first}", f"Origin: {second}") == "origin_not_allowed"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://Team.Example:8443", "chrome-extension://abcdefgh"]
)
def test_the_403_names_the_setting_and_its_value_for_an_origin(tmp_path, origin):
    gate = Gate(tmp_path, False)
    with pytest.raises(errors.OriginNotAllowed) as caught:
        gate.access.check(head(f"Origin: {origin}", "Sec-Fetch-Site: cross-site"), key_needed=True)
    value, name = re.search(r"add (\S+) to XAI_PROXY_(\w+)", str(caught.value)).groups()
    assert caught.value.status == 403
    assert (
        Gate(tmp_path, False, **{name: value})(f"Origin: {origin}", "Sec-Fetch-Site: cross-site")
        is None
    )


def test_the_403_does_not_suggest_listing_the_origin_null(anonymous):
    with pytest.raises(errors.OriginNotAllowed) as caught:
        anonymous.access.check(head("Origin: null"), key_needed=True)
    assert "null" not in str(caught.value) and "the page's origin" in str(caught.value)


# keys


@pytest.mark.parametrize(
    "lines",
    [
        [f"Authorization: Bearer {KEY}"],
        [f"authorization: bearer {KEY}"],
        [f"AUTHORIZATION: BEARER {KEY}"],
        [f"Authorization: Bearer   {KEY}  "],
        [f"X-Api-Key: {KEY}"],
        [f"x-api-key:{KEY}"],
        [f"Authorization: Bearer {KEY}", f"X-Api-Key: {KEY}"],
        [f"Authorization: Bearer {KEY}", "X-Api-Key: wrong"],
        ["Authorization: Bearer wrong", f"X-Api-Key: {KEY}"],
        ["Authorization: Basic dXNlcjpwYXNz", f"X-Api-Key: {KEY}"],
        ["Authorization:", f"X-Api-Key: {KEY}"],
        [f"Authorization: Bearer {KEY}", f"X-Api-Key: {KEYS['phone']}"],
        ["Authorization: Bearer a", "Authorization: Bearer b", f"X-Api-Key: {KEY}"],
    ],
)
def test_a_key_is_accepted_in_every_spelling_of_its_header(keyed, lines):
    assert keyed(*lines) == keyed(*lines, key_needed=False) == "laptop"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Authorization:"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        ["X-Api-Key:"],
        ["Authorization: Bearer wrong"],
        [f"Authorization: {KEY}"],
        [f"Authorization: Basic {KEY}"],
        ["Authorization: Basic eGFpcF9vZi10aGUtbGFwdG9wOg=="],
        [f"Authorization: Token {KEY}"],
        [f"Authorization: Bearer={KEY}"],
        [f"Authorization: Bearer: {KEY}"],
        [f"Authorization: Bearer{KEY}"],
        [f"Authorization: Bearer {KEY} x"],
        [f"Authorization: x Bearer {KEY}"],
        [f"Authorization: Bearer {KEY},"],
        [f'Authorization: Bearer "{KEY}"'],
        [f"Authorization: Bearer Bearer {KEY}"],
        [f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"],
        ["Authorization: Bearer x", f"Authorization: Bearer {KEY}"],
        [f"X-Api-Key: {KEY}", f"X-Api-Key: {KEY}"],
        [f"X-Api-Key: Bearer {KEY}"],
        [f"X-Api-Key: {KEY[:-1]}"],
        [f"X-Api-Key: {KEY}x"],
        [f"X-Api-Key: {KEY.upper()}"],
        [f"X-Api-Key: {client_keys.digest(KEY)}"],
        ["X-Api-Key: laptop"],
        [f"Api-Key: {KEY}"],
        [f"Proxy-Authorization: Bearer {KEY}"],
        [f"Cookie: key={KEY}"],
        ["X-Api-Key: \xe9\xff"],
        [f"Authorization: Bearer\t{KEY}"],
    ],
)
def test_with_keys_the_api_requires_a_valid_one(keyed, lines):
    assert keyed(*lines) == "client_key_required"
    # The proxy's own pages need no key.
    assert keyed(*lines, key_needed=False) is None


def refusal(gate: Gate, *lines: str, **how) -> errors.ErrorResponse:
    with pytest.raises(errors.ErrorResponse) as caught:
        gate.access.check(head(*lines, **how), key_needed=True)
    return caught.value


SEND = "; send `Authorization: Bearer KEY`; `xai-client-key add NAME` makes one"
FIND = "; `xai-client-key list` shows their names, `xai-client-key add NAME` makes one"
TWO = "two different client keys were sent, and neither is one of this proxy's"
UNKNOWN = "the client key sent is not one of this proxy's"
REFUSALS = [
    ([], "this proxy needs a client key" + SEND),
    (["Cookie: key=secret"], "this proxy needs a client key" + SEND),
    (["Authorization: Bearer secret"], UNKNOWN + FIND),
    # A key that was removed, or another proxy's.
    (["Authorization: Bearer xaip_secret"], UNKNOWN + FIND),
    (["X-Api-Key: secret"], UNKNOWN + FIND),
    (["X-Api-Key: secret", "Authorization: Bearer secret"], UNKNOWN + FIND),
    (["X-Api-Key: secret", "Authorization: Bearer other-secret"], TWO + FIND),
    (
        ["Authorization: Basic secret"],
        "Authorization was sent in another form than `Bearer KEY`" + SEND,
    ),
    (["Authorization: secret"], "Authorization was sent in another form than `Bearer KEY`" + SEND),
    (
        ["Authorization: secret secret", "X-Api-Key: secret"],
        f"Authorization was sent in another form than `Bearer KEY` and {UNKNOWN}{FIND}",
    ),
    (
        [f"Authorization: Bearer {KEY}", "Authorization: Bearer secret"],
        "Authorization was sent more than once" + SEND,
    ),
    (
        ["X-Api-Key: secret", "X-Api-Key: secret"],
        "the header field of the API key was sent more than once" + SEND,
    ),
    # As curl sends it if the shell's variable is not set.
    (
        ["Authorization: Bearer "],
        f"Authorization was sent without a key (is the variable that holds it empty?){SEND}",
    ),
    (
        ["X-Api-Key:"],
        "the header field of the API key was sent without a key (is the variable that holds it "
        f"empty?){SEND}",
    ),
]


@pytest.mark.parametrize("lines, message", REFUSALS, ids=range(len(REFUSALS)))
def test_the_401_names_what_is_wrong_with_the_key(keyed, lines, message):
    refused = refusal(keyed, *lines)
    status, fields, _ = refused.rendered()
    assert (status, refused.code) == ("401 Unauthorized", "client_key_required")
    assert ("WWW-Authenticate", 'Bearer realm="xaiproxy"') in fields
    assert str(refused) == message and "secret" not in message
    # Claude Code hides a message that mentions it.
    assert "x-api-key" not in message.lower()
    # Nothing about the other keys.
    assert not [name for name in KEYS if name in message]


def test_the_401_of_a_proxy_without_usable_keys_refers_to_the_log(keyed):
    keyed.path.write_text("")
    for lines in ([], [f"Authorization: Bearer {KEY}"]):
        assert re.search("no client key that can be used.* log", str(refusal(keyed, *lines)))


def test_the_403_of_a_request_with_a_wrong_key_mentions_the_key(keyed, anonymous):
    fault = f"send a client key ({UNKNOWN})"
    for how in ({"host": "evil.example"}, {"host": "-"}):
        assert str(refusal(keyed, "X-Api-Key: secret", **how)).endswith(fault)
        assert str(refusal(keyed, **how)).endswith("send a client key")
        assert str(refusal(anonymous, "X-Api-Key: any", **how)).endswith("send a client key")
    assert str(refusal(keyed, BROWSER, "X-Api-Key: secret", host="box")).endswith(fault)


def test_every_request_checks_the_key_file(keyed):
    assert keyed(f"X-Api-Key: {KEY}") == "laptop"
    lines = keyed.path.read_text()
    keyed.path.unlink()
    assert keyed(f"X-Api-Key: {KEY}") == keyed() == "client_key_required"
    keyed.path.write_text(lines.replace("laptop", "tablet"))
    assert keyed(f"X-Api-Key: {KEY}") == "tablet"


def test_a_key_file_that_appears_later_requires_a_key(anonymous):
    assert anonymous() is None
    anonymous.path.write_text(f"laptop {client_keys.digest(KEY)}\n")
    assert anonymous() == "client_key_required"
    assert anonymous(f"X-Api-Key: {KEY}") == "laptop"


# preflights

REQUESTED_METHOD = "Access-Control-Request-Method: POST"


@pytest.mark.parametrize("gate", ["anonymous", "keyed"])
def test_a_preflight_of_a_listed_origin_is_allowed_what_it_requests(gate, request):
    gate = request.getfixturevalue(gate)
    assert gate.preflight(f"Origin: {LISTED}", REQUESTED_METHOD) == {
        "Access-Control-Allow-Origin": LISTED,
        "Access-Control-Allow-Methods": "POST",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }
    assert gate.preflight(
        f"Origin: {LISTED.upper()}",
        REQUESTED_METHOD,
        "Access-Control-Request-Headers: authorization,content-type",
        "Access-Control-Request-Private-Network: true",
        "Sec-Fetch-Site: cross-site",
    ) == {
        "Access-Control-Allow-Origin": LISTED.upper(),
        "Access-Control-Allow-Methods": "POST",
        "Access-Control-Max-Age": "600",
        "Access-Control-Allow-Headers": "authorization,content-type",
        "Access-Control-Allow-Private-Network": "true",
        "Vary": "Origin",
    }


@pytest.mark.parametrize(
    "origins",
    [
        ["http://evil.example"],
        ["null"],
        [""],
        ["*"],
        [LISTED + ".evil.example"],
        [LISTED + "/"],
        ["http://localhost:9090"],
        [LISTED, LISTED],
        [LISTED, "http://evil.example"],
    ],
)
def test_any_other_preflight_is_refused(anonymous, keyed, origins):
    for gate in (anonymous, keyed):
        lines = [f"Origin: {origin}" for origin in origins]
        assert gate.preflight(*lines, REQUESTED_METHOD) == "origin_not_allowed"
        assert (
            gate.preflight(*lines, REQUESTED_METHOD, f"Authorization: Bearer {KEY}")
            == "origin_not_allowed"
        )


def test_private_network_access_is_allowed_only_on_request(anonymous):
    for value in ("false", "", "true, true"):
        allowed = anonymous.preflight(
            f"Origin: {LISTED}",
            REQUESTED_METHOD,
            f"Access-Control-Request-Private-Network: {value}",
        )
        assert "Access-Control-Allow-Private-Network" not in allowed


@pytest.mark.parametrize(
    "method, lines",
    [
        ("OPTIONS", [f"Origin: {LISTED}"]),
        ("OPTIONS", [REQUESTED_METHOD]),
        ("OPTIONS", []),
        ("GET", [f"Origin: {LISTED}", REQUESTED_METHOD]),
        ("options", [f"Origin: {LISTED}", REQUESTED_METHOD]),
        ("POST", ["Origin: http://evil.example", REQUESTED_METHOD]),
    ],
)
def test_any_other_options_request_is_no_preflight(anonymous, method, lines):
    assert anonymous.preflight(*lines, method=method) is None


def test_an_options_request_of_another_site_is_refused(anonymous):
    assert anonymous("Origin: http://evil.example", method="OPTIONS") == "origin_not_allowed"
